"""The command `peft-child`: inspect, compare, make, merge, combine and check adapters.

Every command reads its inputs, calls one function of the library, and prints. Errors are one line, with exit code 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from peft_child.card.charts import plain
from peft_child.card.plot import draw_child_network, draw_overlap
from peft_child.cli.base_model import load_with_adapter, merge_by_loading, model_settings
from peft_child.cli.checkpoint_names import in_checkpoint_names
from peft_child.cli.destinations import check_apart, check_file, check_folder, check_pictures
from peft_child.cli.output import (
    OneLineErrors,
    counts,
    overlap_as_dict,
    print_json,
    print_overlaps,
    print_settings,
    print_summary,
    progress,
    say,
)
from peft_child.cli.pages import write_adapters_page
from peft_child.cli.summary import summarize
from peft_child.files.adapter_folder import SparseAdapter, open_adapter, read_adapter, write_adapter
from peft_child.files.checkpoint import Checkpoint, replacing
from peft_child.files.combination import combine_adapters, compare_adapters
from peft_child.files.extract import extract_adapter, extract_channels
from peft_child.files.merge import NamesDifferError, check_fits, check_weights, merge_checkpoint
from peft_child.files.patch import export_patch
from peft_child.integrations.locate import locate_adapter, locate_checkpoint
from peft_child.layers.granularity import ENTRY, GRANULARITIES, INPUT_CHANNEL
from peft_child.tensors.codec import FormatError
from peft_child.tensors.combine import COMBINATIONS, MAJORITIES
from peft_child.tensors.delta import Overlap
from peft_child.tuner.config import ChildTuningConfig


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

AdapterName = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its name on the Hugging Face Hub.")
]
AdapterNames = Annotated[
    list[str], typer.Argument(metavar="ADAPTER", help="Folders of adapters, or their names on the Hub.")
]
BaseName = Annotated[
    str, typer.Argument(metavar="BASE", help="Base model: a folder, a safetensors file, or a name on the Hub.")
]
OutputFolder = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of the adapter, if it is on the Hub.")
]
Subfolder = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Where the adapter lies inside of ADAPTER, if not at its top.")
]
Revisions = Annotated[
    list[str] | None,
    typer.Option("--revision", metavar="NAME", help="Branch, tag or commit: once for all adapters, or for each."),
]
BaseRevision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Revision of the base on the Hub; by default the one that the adapter records."),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="OUT.html", help="Make a page of charts, which needs no network; takes plotly."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
EveryTensor = Annotated[bool, typer.Option("--tensors", help="Show every tensor as well.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, complete and unrounded.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-child {version('peft-child')}")
        raise typer.Exit


@app.callback()
def about(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Look at Child-Tuning adapters, and make, compare, combine, check and merge them.

    An adapter is a small file of changes to some weights of a base model, its child network. Adapters and checkpoints
    are local folders, or names of repositories on the Hugging Face Hub such as `me/my-child`.
    `peft-child COMMAND --help` explains each command, with an example.
    """


def main() -> None:
    """Run the command line."""
    app()


@app.command(epilog="Example: `peft-child inspect ./child --plot child.png --html child.html`")
def inspect(
    adapter: AdapterName,
    revision: Revision = None,
    subfolder: Subfolder = None,
    tensors: EveryTensor = False,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the child network as a heat map, layers by modules.")
    ] = None,
    html: Html = None,
    force: Force = False,
) -> None:
    """Show what an adapter holds: its child network by layer and module, its settings and its base model.

    Targeted tensors in which nothing was chosen are not in the file. So the total density shown can be higher than the
    density in the settings, which counts these tensors too.
    """
    check_pictures(plot, html, force)
    folder = locate_adapter(adapter, revision, subfolder=subfolder)
    for made in (plot, html):
        check_apart(made, folder)
    stored = open_adapter(folder)
    summary = summarize(stored)
    if plot:  # before printing, which a pipe such as `| head` may cut short
        with replacing(plot, force) as temporary:
            draw_child_network(stored.sizes, temporary)
        say("wrote", plot)
    if html:
        with replacing(html, force) as temporary:
            # What a folder is called here says nothing elsewhere.
            title = "Child network" if Path(adapter).exists() else f"Child network of {adapter}"
            write_adapters_page(temporary, title, [adapter], [stored], progress=progress)
        say("wrote", html)
    if as_json:
        settings = {key: value for key, value in stored.settings.items() if key != "child_sizes"}
        print_json({"adapter": adapter, "settings": settings, **asdict(summary)})
    else:
        print_settings(adapter, stored.settings)
        print_summary(summary, tensors)


@app.command(
    "overlap", epilog="Example: `peft-child overlap ./mrpc ./rte ./cola --plot overlap.png --html overlap.html`"
)
def compare(
    adapters: AdapterNames,
    revision: Revisions = None,
    tensors: EveryTensor = False,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the Jaccard indices as a heat map.")
    ] = None,
    html: Html = None,
    force: Force = False,
) -> None:
    """Compare the child networks of two or more adapters of one base model, pair by pair.

    Jaccard: entries chosen by both, divided by entries chosen by either; 1 for equal child networks. Times chance:
    entries chosen by both, divided by the number that two random child networks of these sizes would share, in the
    tensors that either changes.
    """
    check_pictures(plot, html, force)
    if len(adapters) < 2:
        raise ValueError("overlap compares two or more adapters, got one.")
    for made in (plot, html):
        check_apart(made, *map(Path, adapters))
    stored = _open_all(adapters, revision)
    found = compare_adapters(stored)
    totals = {pair: sum(by_name.values(), start=Overlap(0, 0, 0, 0)) for pair, by_name in found.items()}
    for first, second in (pair for pair in found if stored[pair[0]].sizes.keys().isdisjoint(stored[pair[1]].sizes)):
        say(
            "note", f"'{adapters[first]}' and '{adapters[second]}' have no tensor in common. Have they one base model?"
        )
    if plot:
        everyone = range(len(adapters))
        jaccard = {pair: total.jaccard for pair, total in totals.items()} | {(i, i): 1.0 for i in everyone}
        with replacing(plot, force) as temporary:
            draw_overlap(adapters, [[jaccard[min(i, j), max(i, j)] for j in everyone] for i in everyone], temporary)
        say("wrote", plot)
    if html:
        with replacing(html, force) as temporary:
            write_adapters_page(temporary, "Overlap of child networks", adapters, stored, found, progress)
        say("wrote", html)
    if as_json:
        pairs = [
            {
                "adapters": [adapters[index] for index in pair],
                **overlap_as_dict(totals[pair]),
                "tensors": {name: overlap_as_dict(part) for name, part in by_name.items()},
            }
            for pair, by_name in found.items()
        ]
        print_json({"adapters": adapters, "pairs": pairs})
    else:
        print_overlaps(adapters, totals, found if tensors else {})


@app.command(epilog="Example: `peft-child extract org/model ./fine-tuned ./child --density 0.01`")
def extract(
    base: BaseName,
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="Checkpoint of the same model after fine-tuning, of any kind.")
    ],
    output: OutputFolder,
    density: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Keep this share of all entries, in (0, 1]; by default all that differ."),
    ] = None,
    granularity: Annotated[
        str,
        typer.Option(metavar="|".join(GRANULARITIES), help="Keep single entries, or whole input channels (columns)."),
    ] = "entry",
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of TUNED, if it is on the Hub.")
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of BASE, if it is on the Hub.")
    ] = None,
    force: Force = False,
) -> None:
    """Make an adapter of the difference between two checkpoints.

    Without --density, merging the adapter into the base gives the fine-tuned checkpoint back bit for bit. With it, the
    entries that changed most are kept. Changes of integer and FP8 tensors are refused; and, without --density, so are
    changes that need more than the 53 bits of a float64, such as from 1e30 to 1.

    The adapter uses the tensor names of the checkpoint, so `merge` and `patch` always accept it. PEFT accepts it only
    if the loaded model uses the same names: transformers renames or fuses tensors of some architectures, such as
    Mixtral, on loading.
    """
    check_folder(output, force)
    before = Checkpoint(locate_checkpoint(base, base_revision))
    after = Checkpoint(locate_checkpoint(tuned, revision))
    check_apart(output, before.path, after.path)
    if granularity == INPUT_CHANNEL and density is not None:
        adapter = extract_channels(before, after, density, progress)
    elif granularity == ENTRY:
        adapter = extract_adapter(before, after, density, progress)
    else:
        raise ValueError(
            f"--granularity must be entry, or input_channel together with --density, got {granularity!r}."
        )
    adapter.settings.update(model_settings(before.path), base_model_name_or_path=base, revision=base_revision)
    write_adapter(output, adapter, force, progress)
    typer.echo(f"extracted {counts(open_adapter(output))} to {plain(output)}")


@app.command(epilog="Example: `peft-child merge ./child org/model ./merged`")
def merge(
    adapter: AdapterName,
    base: BaseName,
    output: OutputFolder,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base_revision: BaseRevision = None,
    force: Force = False,
) -> None:
    """Write a checkpoint with the adapter merged into its base model, which can be used without peft-child.

    Files that describe the model, such as its configuration and tokenizer, are copied from the base.
    """
    check_folder(output, force)
    folder = locate_adapter(adapter, revision, subfolder=subfolder)
    stored = open_adapter(folder)
    path = _locate_base(base, stored, base_revision)
    check_apart(output, folder, path)
    try:
        hidden = merge_checkpoint(stored, Checkpoint(path), output, force, progress)
    except NamesDifferError as error:
        say("note", f"{error} The whole model is loaded to merge it.")
        merge_by_loading(folder, path, output, force)
        hidden = 0
    unseen = f"; {hidden:,} of the changes are too small to show in the dtype of the base" if hidden else ""
    typer.echo(f"merged {counts(stored)} into {plain(output)}{unseen}")


@app.command(epilog="Example: `peft-child combine ./both ./mrpc ./rte --weight 0.7 --weight 0.3 --type ties`")
def combine(
    output: OutputFolder,
    adapters: AdapterNames,
    weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="Once for each adapter, in their order; by default 1.0.")
    ] = None,
    combination_type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help=f"Method: {', '.join(COMBINATIONS)}.")
    ] = "linear",
    density: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Share of every adapter's child network to keep, for all but 'linear'."),
    ] = 1.0,
    majority_sign: Annotated[
        str, typer.Option(metavar="|".join(MAJORITIES), help="How 'ties' and 'dare_ties' elect signs.")
    ] = "total",
    seed: Annotated[int, typer.Option(help="Seed of the random drops of 'dare_linear' and 'dare_ties'.")] = 0,
    revision: Revisions = None,
    force: Force = False,
) -> None:
    """Combine adapters of one base model in a new one, on the union of their child networks."""
    check_folder(output, force)
    check_apart(output, *map(Path, adapters))
    stored = _open_all(adapters, revision)
    combined = combine_adapters(
        stored,
        weight or [1.0] * len(stored),
        combination_type=combination_type,
        density=density,
        majority_sign_method=majority_sign,
        seed=seed,
        progress=progress,
    )
    write_adapter(output, combined, force, progress)
    typer.echo(f"combined {len(stored)} adapters to {counts(open_adapter(output))} in {plain(output)}")


@app.command(epilog="Example: `peft-child patch ./child org/model child-patch.safetensors`")
def patch(
    adapter: AdapterName,
    base: BaseName,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.safetensors", help="File to make.")],
    undo: Annotated[
        Path | None, typer.Option(metavar="UNDO.safetensors", help="Also make the patch that leads back to the base.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base_revision: BaseRevision = None,
    force: Force = False,
) -> None:
    """Write the merged values of the child network alone, as positions and values of the checkpoint's tensors.

    A serving engine that holds the base model can take them in place of a merged copy. For every tensor NAME the file
    has NAME.indices (flat positions) and NAME.values (the values there after merging); its metadata have the shapes.
    """
    check_file(output, force)
    check_file(undo, force)
    if undo is not None and undo.resolve() == output.resolve():
        raise FileExistsError(f"'{undo}' is the output itself; name another file for --undo.")
    folder = locate_adapter(adapter, revision, subfolder=subfolder)
    stored = open_adapter(folder)
    path = _locate_base(base, stored, base_revision)
    for made in (output, undo):
        check_apart(made, folder, path)
    source = None if Path(adapter).exists() else adapter  # what a folder is called here says nothing elsewhere
    checkpoint = Checkpoint(path)
    try:
        export_patch(stored, checkpoint, output, force, progress, undo, source)
    except NamesDifferError as error:
        say("note", f"{error} The patch gets the names of the checkpoint.")
        stored = in_checkpoint_names(stored, checkpoint, progress)
        export_patch(stored, checkpoint, output, force, progress, undo, source)
    typer.echo(f"wrote {counts(stored)} to {plain(output)}" + (f", and back to {plain(undo)}" if undo else ""))


@app.command(epilog="Example: `peft-child verify ./child --base org/model`")
def verify(
    adapter: AdapterName,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Also check that it was made on this checkpoint.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    base_revision: BaseRevision = None,
) -> None:
    """Check an adapter completely; if something is wrong, say what, with exit code 2.

    Every checksum, position and value is checked and, with --base, every name and size and the base's own values.
    """
    folder = locate_adapter(adapter, revision, subfolder=subfolder)
    stored = read_adapter(folder)
    if not stored.deltas:
        raise FormatError("The file holds no child network; it was saved before one was chosen.")
    ChildTuningConfig.from_pretrained(str(folder))  # raises an error if a setting is not valid
    if base is not None:
        checkpoint = Checkpoint(_locate_base(base, stored, base_revision))
        try:
            check_fits(stored, checkpoint)
            check_weights(stored, checkpoint, progress)
        except NamesDifferError as error:
            say("note", f"{error} The whole model is loaded to check it.")
            load_with_adapter(folder, checkpoint.path, check_base="error")
    typer.echo(f"ok: {counts(stored)}" + (f", made on {plain(base)}" if base else ""))


# Shared by several commands


def _locate_base(base: str, adapter: SparseAdapter, revision: str | None) -> Path:
    """The checkpoint of a base; by default of the revision that the adapter records, if it was made on this base."""
    if revision is None and adapter.settings.get("base_model_name_or_path") == base:
        revision = adapter.settings.get("revision")
    return locate_checkpoint(base, revision)


def _open_all(names: Sequence[str], revisions: Sequence[str] | None) -> list[SparseAdapter]:
    given: list[str | None] = list(revisions) if revisions else [None]
    if len(given) not in (1, len(names)):
        raise ValueError(
            f"--revision must be given once for all {len(names)} adapters or once for each, got {len(given)} of them."
        )
    each = given if len(given) == len(names) else given * len(names)
    return [open_adapter(locate_adapter(name, revision)) for name, revision in zip(names, each, strict=True)]
