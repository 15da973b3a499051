"""Functions of the tests, run in two processes that talk through gloo.

The processes are forked from a server that has imported everything, since importing takes ten times as long as most of
these functions. It is no fork of the process of the tests, after whose first backward pass no fork could do another.
"""

import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from .problems import tiny_bert, tiny_llama


ROOT = Path(__file__).parents[1]
_SERVER = multiprocessing.get_context("forkserver")


def _prepare_server():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _SERVER.set_forkserver_preload(
        ["torch", "transformers", "accelerate", "peft_child", "matplotlib.figure", "tests.ranks", "tests.helpers"]
    )


def forked(function, *arguments):
    """A started process of `function(*arguments, connection)`, and the other end of the connection."""
    _prepare_server()
    here, there = _SERVER.Pipe()
    process = _SERVER.Process(target=_call, args=(function.__module__, function.__name__, (*arguments, there)))
    process.start()
    return process, here


def _call(module, function, arguments):
    sys.path.insert(0, str(ROOT))
    getattr(importlib.import_module(module), function)(*arguments)


def on_two_ranks(function, folder, timeout=120):
    """Results of `function(folder)` on rank 0 and rank 1, which both have to end well and in time."""
    _prepare_server()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [
        _SERVER.Process(target=_run, args=(rank, port, function.__module__, function.__name__, folder))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
    assert not errors, "\n".join(errors)
    assert not late, f"{len(late)} of two ranks did not end in {timeout} s"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank, port, module, function, folder):
    """One rank, with the environment that torchrun would make."""
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    warnings.filterwarnings("error")  # as in pyproject.toml
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
        result = getattr(importlib.import_module(module), function)(folder)
        torch.save(result, folder / f"rank{rank}.pt")
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(f"On rank {rank}: {traceback.format_exc()}")
        raise


def batches(name, rank=None):
    """Five global batches of eight examples, or the half of each that belongs to a rank."""
    torch.manual_seed(11)
    found = []
    for _ in range(5):
        ids = torch.randint(2, 50, (8, 6))
        found.append({"input_ids": ids, "labels": ids.clone() if name == "llama" else torch.randint(0, 2, (8,))})
    if rank is None:
        return found
    return [{key: value[4 * rank : 4 * rank + 4] for key, value in batch.items()} for batch in found]


def base_of(name):
    torch.manual_seed(0)
    return tiny_llama() if name == "llama" else tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def train_with(accelerator, model, loader):
    """A loop of one's own through accelerate; returns the model without its wrappers."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model)
