"""The benchmark on language models: its cells, its pages, and its ways to choose and to combine."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.grid.curves import old_where_new_is
from benchmarks.grid.runs import Results, Source
from benchmarks.grid.search import Method
from peft_child import ChildTuningConfig, select_child_network
from peft_child.layers.layer import child_tuning_layers

from .sft_data import save_language_model, save_rows


pytest.importorskip("matplotlib")
from benchmarks.sft.__main__ import CPU
from benchmarks.sft.experiments import E2E, EXPERIMENTS, GSM8K, Settings
from benchmarks.sft.methods import child, chosen_by, lora
from benchmarks.sft.sweep import least_forgotten


ROOT = Path(__file__).parents[1]
SOURCE = Source("model", "data")
METHOD = Method("LoRA", ("--method", "lora"), (3e-4, 1e-3), "sft")
LIKE = Method("LoRA, other", ("--method", "lora", "--rank", "4"), (3e-4, 1e-3), "sft", METHOD)
SWEEP = Settings(SOURCE, seeds=2).sweep("name", "Title", "Text.", E2E, (METHOD, LIKE), equal=(2.0,))


def result(new, old=3.0, seed=1, **changes):
    curve = [[0, 3.0, 2.8], [100, new, old]]
    costs = {
        "entries": 1000,
        "bytes": 2_000_000,
        "seconds_per_step": 1.5,
        "versions": {"torch": "2"},
        "processor": "Abacus",
    }
    return {"seed": seed, "curve": curve, "metrics": {"new": new, "old": old}, **costs, **changes}


def known(cells):
    """Results by command, from losses on new text by method, rate and seed."""
    commands = {SWEEP.run(*cell).command(SOURCE): (cell[-1], new) for cell, new in cells.items()}
    return {
        command: {"command": command, **({"error": "none"} if new is None else result(new, seed=seed))}
        for command, (seed, new) in commands.items()
    }


def test_the_search_goes_on_while_the_best_is_at_an_end():
    found = known({(METHOD, 3e-4, 1): 1.5, (METHOD, 1e-3, 1): 1.4})
    assert SWEEP.rates(METHOD, found) == [3e-4, 1e-3, 3e-3]
    assert SWEEP.best_rate(METHOD, found) is None
    found |= known({(METHOD, 3e-3, 1): None})
    assert SWEEP.best_rate(METHOD, found) == 1e-3


def test_other_seeds_follow_at_the_best_rate():
    first = [SWEEP.run(METHOD, rate, 1) for rate in (3e-4, 1e-3)]
    assert list(SWEEP.runs({})) == first
    found = known({(METHOD, 3e-4, 1): 1.5, (METHOD, 1e-3, 1): 1.4, (METHOD, 3e-3, 1): 1.6})
    third = SWEEP.run(METHOD, 3e-3, 1)
    later = [SWEEP.run(LIKE, 1e-3, 1), SWEEP.run(METHOD, 1e-3, 2)]  # LIKE has the rate of METHOD's search
    assert list(SWEEP.runs(found)) == [*first, third, *later]
    assert len(list(SWEEP.least_runs({}))) == 2 + 1 + 1


def test_commands_name_no_folder_of_this_machine(tmp_path):
    (tmp_path / "model").mkdir()
    here = Source(str(tmp_path / "model"), str(tmp_path / "data"))
    sweep = Settings(here).sweep("name", "Title", "Text.", E2E, (METHOD,))
    run = sweep.run(METHOD, 1e-3, 1)
    assert run.command(here) == SWEEP.run(METHOD, 1e-3, 1).command(SOURCE)
    assert str(tmp_path / "data" / "e2e") in run.arguments(here)


def test_tasks_come_from_the_hub_where_there_is_no_folder():
    sweep = Settings(Source("org/model")).sweep("name", "Title", "Text.", GSM8K, (METHOD,))
    command = sweep.run(METHOD, 1e-3, 1).command(Source("org/model"))
    assert "--model org/model --data openai/gsm8k main --columns question answer" in command


def test_forgetting_is_compared_where_a_loss_is_first_reached():
    points = [(3.0, 2.0), (2.0, 4.0), (1.0, 5.0), (2.0, 9.0)]
    assert old_where_new_is(points, 2.5) == pytest.approx(3.0)
    assert old_where_new_is(points, 1.0) == pytest.approx(5.0)
    assert old_where_new_is(points, 0.9) is None
    assert least_forgotten([points, [(3.0, 2.0), (1.0, 2.0)]], 2.5) == pytest.approx(2.0)
    assert least_forgotten([points], 0.9) is None


def test_a_page_has_what_the_cells_gave(tmp_path):
    cells = {(METHOD, 3e-4, 1): 1.5, (METHOD, 1e-3, 1): 1.4, (METHOD, 3e-3, 1): 1.6, (METHOD, 1e-3, 2): 1.5}
    found = known(cells | {(LIKE, 1e-3, 1): None})
    SWEEP.write(found, tmp_path)
    page = (tmp_path / "name.md").read_text()
    assert "| LoRA | 1,000 | 0.001 | 1.450 ± 0.071 | 3.000 ± 0.000 | 2.0 |\n" in page
    assert "| LoRA | 1.500 / 3.000 | 1.400 / 3.000 | 1.600 / 3.000 |" in page
    assert "| LoRA | 2.925 |" in page  # 2.0 is five eighths of the way from 3.0 to 1.4, the flattest of the three
    assert f"- `{SWEEP.run(LIKE, 1e-3, 1).command(SOURCE)}`: none" in page
    assert "- Abacus, torch 2; runs: 4\n" in page
    assert (tmp_path / "name.svg").exists()


def test_the_committed_pages_are_written_from_the_committed_results(tmp_path):
    folder = ROOT / "docs" / "results" / "language_model"
    source = Source("SmolLM2-135M-Instruct", "data")
    known = Results(folder / "results.jsonl").read()
    for experiment in ("sft", "gsm8k", "choice", "density", "combined", "steps"):
        EXPERIMENTS[experiment](Settings(source, more=CPU)).write(known, tmp_path)
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {file.name for file in folder.iterdir()} - {"results.jsonl"}
    for name in written:
        if name.endswith(".md") or f"Matplotlib v{version('matplotlib')}" in (folder / name).read_text():
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_recorded_commands_of_child_networks_name_the_variant_that_was_trained():
    known = Results(ROOT / "docs" / "results" / "language_model" / "results.jsonl").read()
    assert all(" --variant " in command for command in known if " --method child " in command)
    children = [result for result in known.values() if result.get("method") == "child" and "settings" in result]
    assert {result["settings"]["variant"] for result in children} == {"random", "task_driven"}
    assert all(f" --variant {result['settings']['variant']} " in result["command"] for result in children)


def test_the_tables_that_are_quoted_are_those_of_the_results():
    pages = [page.read_text() for page in (ROOT / "docs" / "results" / "language_model").glob("*.md")]
    found = set(re.findall(r"\d\.\d{3} ± \d\.\d{3}", "\n".join(pages)))
    for place in ("README.md", "docs/results.md"):
        quoted = re.findall(r"\d\.\d{3} ± \d\.\d{3}", (ROOT / place).read_text())
        assert len(quoted) >= 12
        assert found.issuperset(quoted), place


def test_every_method_of_a_table_is_another(tmp_path):
    for make in EXPERIMENTS.values():
        runs = list(make(Settings(SOURCE)).least_runs({}))
        assert len(runs) == len(set(runs))


def test_pages_can_be_written_before_anything_is_known(tmp_path):
    for name, make in EXPERIMENTS.items():
        make(Settings(SOURCE)).write({}, tmp_path)
        assert (tmp_path / f"{name}.md").exists()


def test_some_methods_can_be_left_out():
    sweep = EXPERIMENTS["sft"](Settings(SOURCE, only=("LoRA r=16", "Fisher entries 0.1")))
    assert [method.name for method in sweep.methods] == ["LoRA r=16", "Fisher entries 0.1"]
    with pytest.raises(ValueError, match=r"must name some of LoRA r=16, .*; got LoRA"):
        EXPERIMENTS["sft"](Settings(SOURCE, only=("LoRA",)))


def test_names_say_what_is_chosen():
    assert chosen_by("lowest", child(0.1, (1e-3,))).name == "lowest Fisher entries 0.1"
    assert child(0.1, (1e-3,), channels=True).options[-2:] == ("--granularity", "input_channel")
    assert lora(4).options == ("--method", "lora", "--rank", "4")


@pytest.fixture
def workplace(tmp_path):
    """A folder with a tiny model and tiny data."""
    pytest.importorskip("trl")
    save_language_model(tmp_path / "model")
    save_rows(tmp_path / "data", "e2e", ("meaning", "text"))
    save_rows(tmp_path / "data", "gsm8k", ("question", "answer"))
    return tmp_path


def script_arguments(folder, *more):
    own = ["--model", folder / "model", "--data", folder / "data" / "e2e", "--columns", "meaning", "text"]
    size = ["--steps", 2, "--max-length", 16, "--held-out-old", 1, "--num-fisher-examples", 4, "--density", 0.3]
    return [*map(str, [*own, *size, "--output", folder / "out", *more])]


TRL_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.slow
@TRL_WARNS
@pytest.mark.parametrize("granularity", ["entry", "input_channel"])
def test_the_largest_weights_are_chosen(workplace, granularity):
    from benchmarks.sft.variants import magnitude

    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    squares = {
        f"model.{name}": module.weight.detach().square()
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    if granularity == "input_channel":  # the mean of a channel counts
        squares = {name: square.mean(0).expand_as(square) for name, square in squares.items()}
    border = torch.cat([square.flatten() for square in squares.values()]).quantile(0.7)
    expected = {name: int((square > border).sum()) for name, square in squares.items()}
    config = ChildTuningConfig(density=0.3, granularity=granularity, target_modules="all-linear")
    model = get_peft_model(base, config)
    select_child_network(model, scores=magnitude(model, None, config))
    chosen = {
        name: sum(delta.numel() for delta in layer.named_deltas("default").values())
        for name, layer in child_tuning_layers(model.get_base_model()).items()
    }
    widest = max(len(square) for square in squares.values())
    assert chosen == pytest.approx(expected, abs=widest if granularity == "input_channel" else 1)


@pytest.mark.slow
@TRL_WARNS
def test_lowest_is_the_opposite_and_other_rows_choose_otherwise(workplace):
    from benchmarks.sft import variants

    def entries(*more):
        (found,) = variants.main(script_arguments(workplace, "--learning-rate", "0.1", "--seeds", "1", *more))
        assert found["entries"] == round(0.3 * 4352)
        assert str(workplace) not in json.dumps(found)
        return found["metrics"]

    results = [entries("--choose", choice) for choice in ("highest", "lowest")]
    other = str(workplace / "data" / "gsm8k")
    results.append(entries("--choose-from", other, "question", "answer"))
    assert len({json.dumps(metrics) for metrics in results}) == 3


@pytest.mark.slow
@TRL_WARNS
@pytest.mark.parametrize("method", ["lora", "child"])
def test_combinations_are_those_of_the_adapters(workplace, method):
    from benchmarks.sft import combine

    more = ("--second", str(workplace / "data" / "gsm8k"), "question", "answer", "--second-learning-rate", "0.1")
    arguments = script_arguments(workplace, "--learning-rate", "0.1", "--method", method, "--seeds", "1", *more)
    (found,) = combine.main(arguments)
    combined = found["combined"]
    assert list(combined)[:6] == ["first", "second", "mean", "sum", "TIES", "DARE"]
    assert ("exact sum" in combined) == (method == "lora")
    assert all(loss != before for loss, before in zip(combined["first"], found["base"], strict=True))
    assert len({tuple(losses) for losses in combined.values()}) == len(combined)


@pytest.mark.slow
@TRL_WARNS
def test_steps_are_those_of_the_method_and_of_lora_in_turns(workplace, tmp_path):
    from benchmarks.sft import steps

    settings = Settings(Source(str(workplace / "model"), str(workplace / "data")), only=("full fine-tuning",))
    timing = EXPERIMENTS["steps"](settings)
    (run,) = timing.runs({})
    small = ("--batch-size", "2", "--turns", "3", "--output", str(tmp_path / "runs"))
    (found,) = steps.main([*run.arguments(settings.source), *small])
    assert {name: len(seconds) for name, seconds in found["steps"].items()} == {"own": 3, "lora": 3}
    assert found["tokens"] % 2 == 0
    result = found | {"processor": "Abacus", "steps": {"own": [3.0, 2.0, 4.0], "lora": [1.0, 2.0, 2.0]}}
    timing.write({run.command(settings.source): result}, tmp_path)
    expected = f"| full fine-tuning | 2.00 | 1.00 | 3.00 | 3.00 | 2.00 | 3 | {found['tokens']:,} |\n"
    assert expected in (tmp_path / "steps.md").read_text()


@pytest.mark.by_hand
@pytest.mark.slow
def test_the_driver_runs_a_table_and_its_commands_give_the_same_again(workplace):
    places = ["--model", workplace / "model", "--data", workplace / "data", "--output", workplace / "runs"]
    command = [sys.executable, "-m", "benchmarks.sft", "combined", *places, "--steps", 2, "--seeds", 1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = {"cwd": ROOT, "env": environment, "check": True, "capture_output": True, "text": True}
    subprocess.run([*map(str, command), "--processes", "2"], **run)
    page = (workplace / "runs" / "report" / "combined.md").read_text()
    assert page.count("exact sum") == 1
    assert "Failed runs" not in page
    lines = (workplace / "runs" / "results.jsonl").read_text().splitlines()
    line = next(line for line in map(json.loads, lines) if "examples/sft.py" in line["command"])
    _, script, *words = line["command"].split()
    again = [sys.executable, ROOT / script, *words, "--results", "again.jsonl", "--output", "again"]
    subprocess.run(again, **{**run, "cwd": workplace, "env": {**environment, "OMP_NUM_THREADS": "1"}})
    assert json.loads((workplace / "again.jsonl").read_text())["curve"] == line["curve"]
