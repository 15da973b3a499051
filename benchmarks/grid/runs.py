"""A run is a command line, which is also its key; its result is one line of a file.

Lines are appended under a lock, whole or not at all, and one key is recorded once: so a driver can be killed at any
moment, and what it had started can end or not.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


Known = Mapping[str, Mapping[str, Any]]  # results by command


class Source(NamedTuple):
    """The model and the data of all runs, as names on the Hub or as folders of this machine.

    Attributes:
        model: Name or folder.
        data: Folder with TASK/train.jsonl and TASK/validation.jsonl, or None for the Hub.
    """

    model: str
    data: str | None = None

    def options(self) -> tuple[str, ...]:
        """For the command line."""
        return ("--model", self.model, *(("--data", self.data) if self.data else ()))

    def shown(self) -> Source:
        """Without what is particular to this machine: of folders the name alone."""
        model = Path(self.model).name if Path(self.model).is_dir() else self.model
        return Source(model, self.data and Path(self.data).name)

    def without_folders(self, text: str) -> str:
        """A text in which the folders are called by their names alone."""
        for own, shown in zip(self, self.shown(), strict=True):
            text = text.replace(own, shown) if own and shown else text
        return text


class Run(NamedTuple):
    """One call of a script.

    Attributes:
        script: A name in SCRIPTS.
        options: Its command line, but for the source.
    """

    script: str
    options: tuple[str, ...]

    def command(self, source: Source) -> str:
        """What to type to get the result again; it is the key of the run."""
        return source.without_folders(" ".join(["python", *SCRIPTS[self.script], *self.arguments(source)]))

    def arguments(self, source: Source) -> list[str]:
        """The command line of the script."""
        return [*(source.options() if self.script in OF_TASKS else ()), *self.options]

    def option(self, name: str) -> str | None:
        """The value of an option, or None."""
        return self.options[self.options.index(name) + 1] if name in self.options else None


SCRIPTS = {
    "glue": ("examples/glue.py",),
    "variants": ("-m", "benchmarks.glue.variants"),
    "children": ("-m", "benchmarks.glue.children"),
    "forgetting": ("-m", "benchmarks.glue.forgetting"),
    "sft": ("examples/sft.py",),
    "sft_variants": ("-m", "benchmarks.sft.variants"),
    "sft_combine": ("-m", "benchmarks.sft.combine"),
    "sft_steps": ("-m", "benchmarks.sft.steps"),
}
OF_TASKS = ("glue", "variants", "children")  # these take the model and the folder of the data from the source


class Results:
    """The results of runs by command: the last line of each in a JSONL file.

    A line has `command`, `processor`, and what the run returned, or `error`, the reason why it failed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, dict[str, Any]]:
        """All results by command."""
        if not self.file.exists():
            return {}
        lines = self.file.read_text("utf-8").split("\n")
        complete = (json.loads(line) for line in lines[:-1] if line)  # a torn last line has no end
        return {result["command"]: result for result in complete}

    def append(self, result: dict[str, Any], replace: bool = False) -> bool:
        """Record a result, unless its command has one already.

        Args:
            result: With `command`, and `error` if it failed.
            replace: Record it after a failure.

        Returns:
            Whether it was recorded.
        """
        line = json.dumps(result).encode() + b"\n"
        with locked(self.file.with_suffix(".lock")):
            known = self.read().get(result["command"])
            if known is not None and not (replace and "error" in known):
                return False
            with self.file.open("r+b" if self.file.exists() else "w+b") as file:
                file.truncate(self._end_of_lines())
                file.seek(0, os.SEEK_END)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        return True

    def _end_of_lines(self) -> int:
        return self.file.read_bytes().rfind(b"\n") + 1


def succeeded(runs: Iterable[Run], source: Source, known: Known) -> list[Mapping[str, Any]]:
    """The results of those runs that have been done and have not failed, in their order."""
    results = [known[command] for run in runs if (command := run.command(source)) in known]
    return [result for result in results if "error" not in result]


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which the system gives back whatever happens to the process.

    Raises:
        BlockingIOError: If another process holds it and `wait` is False.
    """
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
