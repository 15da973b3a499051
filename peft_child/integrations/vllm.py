"""Child networks in vLLM: loaded with the base model, and exchanged in a running engine.

vLLM finds `register_with_vllm` through the entry point `vllm.general_plugins`, in all of its processes.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args


if find_spec("vllm") is None:
    raise ImportError("peft_child.integrations.vllm needs vLLM 0.32 or newer: pip install 'peft-child[vllm]'.")

import requests  # which vLLM needs as well


if TYPE_CHECKING:
    from vllm import LLM


NAME = "peft_child"  # of the load format, and of the backend of weight updates
BASE_VERSION = "base"  # the weight version of an engine without a child network
CANCEL = {"cancel": True}

Running = Literal["wait", "abort", "keep"]


class SwapError(RuntimeError):
    """A child network could not be exchanged; the message says what the engine holds now."""


def register_with_vllm() -> None:
    """Register the load format and the backend with vLLM; calling this again changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import register_model_loader

    from peft_child.integrations.vllm_loader import ChildNetworkLoader

    register_model_loader(NAME)(ChildNetworkLoader)
    with suppress(ValueError):  # registered already
        WeightTransferEngineFactory.register_engine(
            NAME, "peft_child.integrations.vllm_worker", "ChildNetworkTransfer"
        )


def swap_child_network(
    engine: LLM | str,
    adapter: str | Path | None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    running: Running = "wait",
) -> None:
    """Exchange the child network of a running engine, or take it out.

    Every worker reads the adapter itself and checks all of it, the base and its own weights, before the first worker
    writes. The weights are then those of the merged checkpoint, or of the base, bit for bit. Prefix caches are
    cleared, and vLLM's weight version becomes the adapter's name, or `"base"`.

    One client at a time may swap. A swap that succeeds ends a pause of the engine, whoever has paused it.

    Args:
        engine: An `LLM` made with `weight_transfer_config={"backend": "peft_child"}`; or the address of a server, such
            as `"http://localhost:8000"`, started with `--weight-transfer-config '{"backend": "peft_child"}'` and
            `VLLM_SERVER_DEV_MODE=1`.
        adapter: The adapter's folder on the engine's machines, its name on the Hub, or a patch file (`.safetensors`);
            None for the base alone. An adapter replaces the one before it; a patch is applied on top of what is there.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Where the adapter is in its folder.
        running: What becomes of running requests. `"wait"` finishes them first; `"abort"` ends them; `"keep"` goes on
            with the new weights after the tokens that they have.

    Raises:
        SwapError: If something is refused, in which case nothing was written and the engine goes on as before; or if
            writing failed. The engine then stays paused until a swap succeeds.
        ValueError: If `running` is none of the three.
    """
    if running not in get_args(Running):
        raise ValueError(f"running must be 'wait', 'abort' or 'keep', got {running!r}.")
    connection = _connect(engine)
    name = None if adapter is None else str(adapter)
    if name is not None and not isinstance(engine, str) and Path(name).exists():
        name = str(Path(name).resolve())  # workers may have another working directory
    started = False
    was_paused = connection.is_paused()
    try:
        connection.pause(running)
        connection.start()
        started = True
        connection.update({"adapter": name, "revision": revision, "subfolder": subfolder})
    except BaseException as error:
        if started:
            connection.cancel()
        if not was_paused:
            connection.resume()
        if not isinstance(error, Exception):
            raise
        raise SwapError(f"Nothing was written{', and the engine is still paused' * was_paused}. {error}") from error
    try:
        connection.finish(BASE_VERSION if name is None else name)
    except BaseException as error:
        connection.cancel()
        if not isinstance(error, Exception):
            raise
        raise SwapError(
            "Writing failed, and the engine stays paused until a swap succeeds: it may hold parts of two child "
            f"networks. swap_child_network(engine, None) goes back to the base. {error}"
        ) from error
    connection.resume()


def cancel_swap(engine: LLM | str) -> None:
    """End an update that another client has begun and will not finish, and let the engine go on.

    Args:
        engine: As for `swap_child_network`.
    """
    connection = _connect(engine)
    connection.cancel()
    connection.resume()


def _connect(engine: LLM | str) -> _Connection:
    return _Server(engine) if isinstance(engine, str) else _Local(engine)


class _Connection(Protocol):
    """The weight updates of an engine."""

    def is_paused(self) -> bool:
        """Whether the engine is paused already."""

    def pause(self, running: Running) -> None:
        """Stop generating, and clear what was computed with the present weights."""

    def resume(self) -> None:
        """Go on generating."""

    def start(self) -> None:
        """Begin an update."""

    def update(self, info: dict[str, Any]) -> None:
        """Let every worker read and check."""

    def finish(self, version: str) -> None:
        """Let every worker write."""

    def cancel(self) -> None:
        """End the update without writing."""


class _Local:
    """An engine in this process, or in processes that it started."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.start = llm.start_weight_update
        self.finish = llm.finish_weight_update

    def is_paused(self) -> bool:
        return bool(self.engine.is_sleeping())

    def pause(self, running: Running) -> None:
        if running == "abort":  # here as well, where they wait for answers
            self.engine.abort_request(list(self.engine.output_processor.request_states), internal=True)
        idle = not self.engine.has_unfinished_requests()
        self.llm.sleep(level=0, mode="abort" if idle else running)
        self.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    def resume(self) -> None:
        self.llm.wake_up(tags=["scheduling"])

    def update(self, info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": info})

    def cancel(self) -> None:
        with suppress(Exception):  # how a worker ends an update
            self.update(CANCEL)


class _Server:
    """An engine behind vLLM's HTTP server."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        try:
            response = requests.request(method, f"{self.address}/{path}", json=body)  # no timeout: waiting takes long
        except requests.RequestException as error:
            raise SwapError(f"There is no answer from {self.address}: {error}") from error
        if not response.ok:
            raise SwapError(f"{method} {self.address}/{path} answered {response.status_code}: {response.text}")
        return response.json()

    def is_paused(self) -> bool:
        return bool(self.ask("is_paused", method="GET")["is_paused"])

    def pause(self, running: Running) -> None:
        self.ask(f"pause?mode={running}&clear_cache=true")

    def resume(self) -> None:
        self.ask("resume")

    def start(self) -> None:
        self.ask("start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self.ask("update_weights", {"update_info": info})

    def finish(self, version: str) -> None:
        self.ask("finish_weight_update", {"weight_version": version})

    def cancel(self) -> None:
        with suppress(SwapError):
            self.update(CANCEL)
