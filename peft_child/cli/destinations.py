"""Where the output of a command may go: it replaces nothing unasked, and no input.

The rules are checked before the work, not after it.
"""

from __future__ import annotations

from pathlib import Path

from peft_child.files.adapter_folder import CONFIG_NAME
from peft_child.files.checkpoint import CHECKPOINT_NAME, INDEX_NAME


PICTURES = {".png", ".html"}


def check_folder(output: Path, force: bool) -> None:
    """Refuse a folder that exists, unless it is to be replaced and has an adapter or a checkpoint.

    Raises:
        FileExistsError: If the output must not be written.
    """
    marks = (CONFIG_NAME, "config.json", CHECKPOINT_NAME, INDEX_NAME)
    if output.exists() and not force:
        raise FileExistsError(f"'{output}' exists already; pass --force to replace it.")
    if output.exists() and not any((output / name).is_file() for name in marks):
        raise FileExistsError(f"'{output}' is not the folder of an adapter or a checkpoint; it is not replaced.")


def check_file(output: Path | None, force: bool) -> None:
    """Refuse a file that exists, unless it is to be replaced, and a folder.

    Raises:
        FileExistsError: If the output must not be written.
        IsADirectoryError: If it is a folder.
    """
    if output and output.is_dir():
        raise IsADirectoryError(f"'{output}' is a folder; name a file.")
    if output and output.exists() and not force:
        raise FileExistsError(f"'{output}' exists already; pass --force to replace it.")


def check_pictures(plot: Path | None, html: Path | None, force: bool) -> None:
    """As `check_file` for a picture and a page, which must be two files.

    Raises:
        FileExistsError: If one of them must not be written.
        IsADirectoryError: If one is a folder.
    """
    check_file(plot, force)
    check_file(html, force)
    if plot and html and plot.resolve() == html.resolve():
        raise FileExistsError(f"'{html}' is the plot itself; name another file for --html.")


def check_apart(output: Path | None, *inputs: Path) -> None:
    """Refuse an output that is an input, contains one, or replaces a file in one.

    Pictures and pages are excepted, so that they can be made again in the adapter's folder. An output that is a link
    counts as the link and as its target.

    Raises:
        FileExistsError: If the output must not be written.
    """
    if output is None:
        return
    targets = {output.resolve(), output.parent.resolve() / output.name}
    for place in inputs:
        read = {file.resolve() for file in (place, *place.rglob("*")) if file.suffix not in PICTURES}
        around = {file for file in targets if place.resolve() in file.parents and file.suffix not in PICTURES}
        if (around and output.exists()) or any(target in (file, *file.parents) for target in targets for file in read):
            raise FileExistsError(f"'{output}' is, contains or is part of the input '{place}'; name another output.")
