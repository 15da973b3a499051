"""What the command line says: tables, JSON, progress bars, and warnings and errors in one line each."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from tqdm import tqdm
from typer.core import TyperGroup

from peft_child.card.charts import plain
from peft_child.cli.summary import Counted, Summary
from peft_child.files.adapter_folder import SparseAdapter
from peft_child.tensors.delta import Overlap, total_size


EXPECTED_ERRORS = (OSError, ValueError, ImportError, SafetensorError)
SETTINGS = ("variant", "density", "granularity", "delta_dtype")
SETTINGS_OF_VARIANT = {
    "task_driven": ("fisher", "fisher_examples"),
    "random": ("seed",),
    "task_free": ("resample_every",),
}
SETTINGS_OF_MASKS = ("gradient_density", "resample_every")
PART_COLUMNS = ("chosen", "of", "density", "index bytes", "delta bytes", "delta norm", "dtype")
OVERLAP_COLUMNS = ("shared", "of first", "of second", "Jaccard", "times chance")
TABLE_WIDTH = 1000  # never shrinks columns: a narrow terminal wraps whole lines, which is easier to read


class OneLineErrors(TyperGroup):
    """Prints warnings and errors in one line each, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit code 2 if it fails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # users of a command cannot act on deprecations
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = lambda message, *details: say("warning", message)
                return super().invoke(ctx)
        except BrokenPipeError:  # the reader has left, as `head` does; typer handles it
            raise
        except EXPECTED_ERRORS as error:
            say("error", _error_text(error))
            raise typer.Exit(2) from None


def progress(names: Sequence[str], title: str) -> Iterable[str]:
    """A progress bar on standard error, if that is a terminal."""
    bar: Iterable[str] = tqdm(names, desc=title, disable=None, leave=False)  # None: hidden if not a terminal
    return bar


def say(kind: str, message: object) -> None:
    """Print one line on standard error."""
    typer.echo(f"{kind}: {plain(message)}", err=True)


def _error_text(error: BaseException) -> str:
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        _, target, reason = error.args[0][0]  # the first of possibly many files
        return f"'{target}' cannot be written: {reason}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; install it with: pip install {error.name}"
    return str(error)


def counts(adapter: SparseAdapter) -> str:
    """How many entries an adapter from a folder changes, for a sentence."""
    whole = total_size(adapter.sizes.values())
    return f"{whole.chosen:,} of the {whole.numel:,} entries of {len(adapter.sizes)} tensors"


def print_json(content: Mapping[str, Any]) -> None:
    """Print JSON on standard output."""
    typer.echo(json.dumps(content, indent=2))


def print_settings(adapter: str, settings: Mapping[str, Any]) -> None:
    """Print the adapter's name, its base model, and how its child network was selected."""
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    typer.echo(f"adapter: {plain(adapter)}")
    typer.echo(f"base: {plain(base)}" + (f", revision {plain(revision)}" if revision else ""))
    keys = (*SETTINGS, *SETTINGS_OF_VARIANT.get(str(settings.get("variant")), ()))
    if settings.get("gradient_density", 1) != 1:
        keys += SETTINGS_OF_MASKS
    known = [f"{key} {plain(settings[key])}" for key in keys if settings.get(key) is not None]
    typer.echo(f"settings: {', '.join(known)}")


def print_summary(summary: Summary, tensors: bool) -> None:
    """Print tables of an adapter's layers and modules, and of every tensor if asked to."""
    if tensors:
        _print_parts("tensor", summary.tensors)
    _print_parts("layer", summary.layers)
    _print_parts("module", {**summary.modules, "total": summary.total})
    for name, whole in summary.saved_whole.items():
        typer.echo(f"saved whole: {plain(name)}, {whole['dtype']} {whole['shape']}, {whole['bytes']:,} bytes")


def _print_parts(title: str, parts: Mapping[str, Counted]) -> None:
    rows = [
        [
            name,
            f"{part.chosen:,}",
            f"{part.numel:,}",
            f"{part.density:.3%}",
            f"{part.index_bytes:,}",
            f"{part.delta_bytes:,}",
            f"{part.norm:.4g}",
            part.dtype,
        ]
        for name, part in parts.items()
    ]
    _print_table([title], PART_COLUMNS, rows)


def overlap_as_dict(found: Overlap) -> dict[str, float]:
    """Counts and indices of an overlap, for JSON."""
    return {**found._asdict(), "jaccard": found.jaccard, "over_chance": found.over_chance}


def print_overlaps(
    names: Sequence[str],
    totals: Mapping[tuple[int, int], Overlap],
    by_tensor: Mapping[tuple[int, int], Mapping[str, Overlap]],
) -> None:
    """Print a table with the overlap of every two adapters, and one by tensor for each pair in `by_tensor`."""
    rows = [[names[first], names[second], *_overlap_cells(found)] for (first, second), found in totals.items()]
    _print_table(["first", "second"], OVERLAP_COLUMNS, rows)
    for (first, second), overlaps in by_tensor.items():
        typer.echo(f"{plain(names[first])} and {plain(names[second])}")
        _print_table(["tensor"], OVERLAP_COLUMNS, [[name, *_overlap_cells(part)] for name, part in overlaps.items()])


def _overlap_cells(found: Overlap) -> list[str]:
    entries = [f"{count:,}" for count in (found.shared, found.first, found.second)]
    return [*entries, f"{found.jaccard:.4f}", f"{found.over_chance:.4g}"]


def _print_table(names: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(plain, row))
    Console(width=TABLE_WIDTH, markup=False, highlight=False, emoji=False, force_jupyter=False).print(table)
    typer.echo()
