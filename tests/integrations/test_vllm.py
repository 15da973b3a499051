"""Child networks exchanged in a running engine, in this process and behind a server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_child.files.adapter_folder import open_adapter
from peft_child.files.checkpoint import Checkpoint
from peft_child.files.merge import merge_checkpoint

from .engines import PROMPTS, SWAPPING, UNPACKED, answers, digests, engine, save_child, save_llama, vllm


import requests  # isort: skip  # vLLM brings it
from peft_child.integrations.vllm import SwapError, swap_child_network  # isort: skip

# Engines take seconds each; and the warnings are those of vLLM about other packages.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, three child networks of it, and what the merged checkpoints hold and answer."""
    folder = tmp_path_factory.mktemp("serving")
    base = save_llama(folder / "base")
    for number, channels in enumerate([False, True, False]):
        save_child(folder / f"{number}", base, seed=number, channels=channels)
    save_child(folder / "strange", save_llama(folder / "other", seed=9))
    for number in (0, 1):
        merge_checkpoint(open_adapter(folder / f"{number}"), Checkpoint(base), folder / f"merged{number}")
    for name in ("base", "merged0", "merged1"):
        with engine(folder / name, **UNPACKED) as llm:
            (folder / f"{name}.json").write_text(json.dumps([digests(llm), answers(llm)]))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder / "base", **SWAPPING, enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture(autouse=True)
def from_the_base(request):
    """Every test begins and ends with the base."""
    yield
    if "llm" in request.fixturenames:
        swap_child_network(request.getfixturevalue("llm"), None)


def state_of(llm):
    return json.loads(json.dumps([digests(llm), answers(llm)]))


def expected(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_weights_and_answers_are_those_of_the_merged_checkpoints(folder, llm):
    assert state_of(llm) == expected(folder, "base")
    for adapter, name in [("0", "merged0"), ("1", "merged1"), ("1", "merged1"), (None, "base"), ("0", "merged0")]:
        swap_child_network(llm, adapter and folder / adapter)
        assert state_of(llm) == expected(folder, name)  # the prompts are those of before: nothing is left in a cache
        assert llm.get_weight_version() == (str(folder / adapter) if adapter else "base")


def test_a_hundred_swaps_leave_the_weights_as_they_were(folder, llm):
    for number in range(100):
        swap_child_network(llm, folder / str(number % 3))
    swap_child_network(llm, None)
    assert state_of(llm) == expected(folder, "base")


def test_what_becomes_of_running_requests(folder, llm):
    sampling = vllm.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)

    def begin():
        llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], sampling, use_tqdm=False)
        for _ in range(5):
            llm.llm_engine.step()

    def finish():
        (output,) = llm.wait_for_completion(use_tqdm=False)
        return output.outputs[0]

    with pytest.raises(ValueError, match="running must be 'wait', 'abort' or 'keep', got 'abrot'"):
        swap_child_network(llm, folder / "0", running="abrot")
    begin()
    with pytest.raises(SwapError, match=r"Nothing was written\. 'wait' pause mode is not supported"):
        swap_child_network(llm, folder / "0")
    before = finish().token_ids
    assert state_of(llm) == expected(folder, "base")

    begin()
    swap_child_network(llm, folder / "0", running="keep")
    kept = finish()
    assert len(kept.token_ids) == 20
    assert list(kept.token_ids[:4]) == list(before[:4])
    assert kept.token_ids != before
    assert state_of(llm) == expected(folder, "merged0")

    begin()
    swap_child_network(llm, None, running="abort")
    assert not llm.llm_engine.has_unfinished_requests()
    assert state_of(llm) == expected(folder, "base")


def test_what_is_refused_is_refused_before_anything_is_written(folder, llm):
    swap_child_network(llm, folder / "0")
    untouched = "^Nothing was written[.] .*The engine holds '.*/0', whole.$"
    for adapter, problem in [
        (folder / "strange", "are not those that the adapter was made on"),
        (folder / "none", "There is no file or folder"),
        (folder, "is not an adapter folder"),
        (folder / "none.safetensors", "There is no patch file"),
    ]:
        with pytest.raises(SwapError, match=untouched) as refused:
            swap_child_network(llm, adapter)
        assert problem in str(refused.value)
    assert state_of(llm) == expected(folder, "merged0")


def test_an_engine_that_was_not_prepared(folder):
    with engine(folder / "base") as llm, pytest.raises(SwapError, match="weight_transfer_config"):
        swap_child_network(llm, folder / "0")


def test_without_vllm_the_import_says_what_to_install():
    code = """
import importlib.util, sys
find, sys.modules["vllm"] = importlib.util.find_spec, None
importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else find(name, *rest)
import peft_child
assert not {"peft", "transformers"} & sys.modules.keys(), "the package alone needs neither"
try:
    import peft_child.integrations.vllm
except ImportError as error:
    print(error)
try:
    from peft_child import ChildTuningConfig
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines() == [
        "peft_child.integrations.vllm needs vLLM 0.32 or newer: pip install 'peft-child[vllm]'.",
        "peft_child.ChildTuningConfig needs PEFT: pip install 'peft>=0.21'.",
    ]


@pytest.fixture
def server(folder, tmp_path):
    address, log = "http://127.0.0.1:18573", tmp_path / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")),
        *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "64", "--skip-tokenizer-init"),
        *("--host", "127.0.0.1", "--port", address.rpartition(":")[2]),
        *("--weight-transfer-config", json.dumps(SWAPPING["weight_transfer_config"])),
        *("--worker-extension-cls", UNPACKED["worker_extension_cls"]),
    ]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **settings}, cwd=tmp_path
        )
    try:
        for _ in range(300):
            time.sleep(0.5)
            try:
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                assert process.poll() is None, log.read_text()[-3000:]
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_a_server(folder, server):
    def tokens():
        body = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = requests.post(f"{server}/v1/completions", json=body, timeout=60)
        assert answer.ok, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def expected_tokens(name):
        return expected(folder, name)[1][0][0]

    assert tokens() == expected_tokens("base")
    for adapter, name in [("0", "merged0"), ("1", "merged1"), (None, "base"), ("1", "merged1")]:
        swap_child_network(server, adapter and folder / adapter)
        assert tokens() == expected_tokens(name)
    with pytest.raises(SwapError, match="Nothing was written") as refused:
        swap_child_network(server, folder / "strange")
    assert "are not those that the adapter was made on" in str(refused.value)
    assert tokens() == expected_tokens("merged1")
    with pytest.raises(SwapError, match="There is no answer from http://127"):
        swap_child_network("http://127.0.0.1:9", None)
