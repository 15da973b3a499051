"""Runs in processes of their own, with one thread each.

A fork server has imported what they need, so that starting one costs little and runs share nothing else. When the
driver dies, however it dies, they end too.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.grid.runs import SCRIPTS, Results, Run, Source
from benchmarks.grid.scripts import load
from benchmarks.machine import processor


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc keeps what is freed, in huge pages: a training step takes a fifth less time, and gives the same numbers.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Pool:
    """Executes runs until none is left.

    Args:
        source: The model and the data.
        folder: For results.jsonl, the output of each run in logs/, and what runs need while they last.
        processes: How many at the same time.
        preload: Modules that the runs need, imported once for all of them.
        retry: Run what has failed before once more.
    """

    def __init__(
        self, source: Source, folder: Path, processes: int, preload: Sequence[str] = (), retry: bool = False
    ) -> None:
        self.source, self.folder, self.processes, self.preload = source, folder, processes, list(preload)
        self.results = Results(folder / "results.jsonl")
        self.retried = {key for key, result in self.results.read().items() if "error" in result} if retry else set()
        self.running: dict[Run, BaseProcess] = {}

    def work(self, plan: Callable[[], Iterable[Run]]) -> None:
        """Execute what `plan` returns, asking again after each run, as later runs depend on earlier results."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        for folder in ("logs", "work"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        os.environ |= ENVIRONMENT
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.preload)
        try:
            while (waiting := self._waiting(plan())) or self.running:
                for run in waiting[: self.processes - len(self.running)]:
                    arguments = (run, self.source, self.folder, run.command(self.source) in self.retried)
                    self.running[run] = context.Process(target=execute, args=arguments)
                    self.running[run].start()
                wait([process.sentinel for process in self.running.values()])
                self._collect()
        finally:
            for process in self.running.values():
                process.kill()

    def _waiting(self, runs: Iterable[Run]) -> list[Run]:
        known = self.results.read().keys() - self.retried
        left = (run for run in dict.fromkeys(runs) if run not in self.running)
        return [run for run in left if run.command(self.source) not in known]

    def _collect(self) -> None:
        """Take leave of the runs that have ended, and record a failure of those that could not do it themselves."""
        for run, process in list(self.running.items()):
            if process.is_alive():
                continue
            process.join()
            del self.running[run]
            command = run.command(self.source)
            if process.exitcode:
                error = f"the process ended with {process.exitcode}"
                self.results.append({"command": command, "error": error}, command in self.retried)
            self.retried.discard(command)
            outcome = self.results.read()[command].get("error", "done")
            print(f"{outcome.splitlines()[0]}: {command}", flush=True)


def execute(run: Run, source: Source, folder: Path, replace: bool) -> None:
    """The body of a process: execute a run and record its result."""
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    command = run.command(source)
    name = sha256(command.encode()).hexdigest()[:16]
    work = folder / "work" / name
    with (folder / "logs" / f"{name}.txt").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    print(command, flush=True)
    try:
        arguments = [*run.arguments(source), "--output", str(work)]
        (result,) = _main_of(run.script)(arguments)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        result = {"error": source.without_folders(f"{type(error).__name__}: {error}")}
    shutil.rmtree(work, ignore_errors=True)
    Results(folder / "results.jsonl").append({"command": command, **result, "processor": processor()}, replace)


def _main_of(script: str) -> Any:
    *_, place = SCRIPTS[script]
    module = load(Path(place).stem) if place.endswith(".py") else importlib.import_module(place)
    return module.main


def _end_with_the_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    wait([driver.sentinel])
    os._exit(1)
