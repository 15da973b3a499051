"""The driver of the GLUE benchmark: every run once, rates chosen on training rows, honest intervals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.glue.grid import Grid
from benchmarks.grid.intervals import RESAMPLES, bootstrap_interval
from benchmarks.grid.runs import Results, Source
from benchmarks.grid.search import LADDER, MOST_RATES, Method

from .glue_data import save_model, save_task


ROOT = Path(__file__).parents[1]
SOURCE = Source("encoder", "data")
REPORT = ROOT / "docs" / "results"
COMMITTED = {  # and how
    "main": {},
    "rates": {},
    "ablations": {},
    "granularity": {},
    "transfer": {"only": ("Full", "CT_D 0.3")},
    "examples": {"tasks": ("mrpc", "stsb"), "only": ("CT_D 0.3", "32 examples", "1000 examples")},
    "probes": {},
    "forgetting": {},
    "overlap": {},
}
METHOD = Method("Full", ("--method", "full"), (3e-5, 1e-4, 3e-4))
GRID = Grid(SOURCE, ("mrpc",), (METHOD,), (), ("--max-train-examples", "8"), ("--max-train-examples", "16"), (1, 2))


def slow_interval(differences, seed):
    """The definition: draw as many pairs as there are with replacement, many times, and cut off 2.5 % at both ends."""
    drawn = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    means = sorted(sum(differences[index] for index in resample) / len(differences) for resample in drawn)
    ends = []
    for share in (0.025, 0.975):
        below = int(share * (RESAMPLES - 1))
        rest = share * (RESAMPLES - 1) - below
        ends.append(means[below] * (1 - rest) + means[below + 1] * rest)
    return tuple(ends)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_interval_is_that_of_the_definition(count):
    draw = random.Random(count)
    differences = [draw.gauss(0.5, 1) for _ in range(count)]
    assert bootstrap_interval(differences, seed=3) == pytest.approx(slow_interval(differences, seed=3), abs=1e-12)


def test_interval_of_equal_differences_is_a_point():
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_interval_needs_two_differences():
    with pytest.raises(ValueError, match="at least two differences, got 1"):
        bootstrap_interval([1.0])


def searched(scores):
    """Results of the search by command, from scores by rate; None is a failure."""
    return {
        run.command(SOURCE): {"error": "none"} if score is None else {"metrics": {"accuracy": score}}
        for rate, score in scores.items()
        for run in GRID.search("mrpc", METHOD, rate)
    }


def rates_and_choice(scores):
    known = searched(scores)
    return GRID.rates("mrpc", METHOD, known), GRID.chosen_rate("mrpc", METHOD, known)


def test_the_best_rate_is_chosen_when_all_are_known():
    assert rates_and_choice({3e-5: 0.5, 1e-4: 0.6}) == ([3e-5, 1e-4, 3e-4], None)
    assert rates_and_choice({3e-5: 0.5, 1e-4: 0.6, 3e-4: 0.5}) == ([3e-5, 1e-4, 3e-4], 1e-4)


def test_the_search_goes_on_beyond_the_best_rate():
    scores = {3e-5: 0.5, 1e-4: 0.6, 3e-4: 0.7}
    assert rates_and_choice(scores) == ([3e-5, 1e-4, 3e-4, 1e-3], None)
    assert rates_and_choice(scores | {1e-3: 0.6}) == ([3e-5, 1e-4, 3e-4, 1e-3], 3e-4)
    assert rates_and_choice({3e-5: 0.7, 1e-4: 0.6, 3e-4: 0.5}) == ([1e-5, 3e-5, 1e-4, 3e-4], None)
    assert rates_and_choice(dict(zip(LADDER, range(len(LADDER)), strict=True)))[0][-1] == 3e-3
    assert len(rates_and_choice(dict(zip(LADDER, range(len(LADDER)), strict=True)))[0]) == MOST_RATES


def test_failed_rates_are_not_chosen():
    assert rates_and_choice({3e-5: 0.1, 1e-4: 0.2, 3e-4: None})[1] == 1e-4
    assert rates_and_choice({3e-5: None, 1e-4: None, 3e-4: None})[1] is None


def test_only_the_search_holds_out_training_rows():
    search, reported = GRID.search("mrpc", METHOD, 1e-4), GRID.reported("mrpc", METHOD, 1e-4)
    assert all(run.option("--hold-out") for run in search)
    assert not any(run.option("--hold-out") for run in reported)
    assert not {run.option("--seeds") for run in search} & {run.option("--seeds") for run in reported}
    assert {run.option("--max-train-examples") for run in search} == {"8"}
    assert {run.option("--max-train-examples") for run in reported} == {"16"}


def test_runs_follow_from_what_is_known():
    assert list(GRID.runs({})) == [run for rate in METHOD.rates for run in GRID.search("mrpc", METHOD, rate)]
    known = searched({3e-5: 0.5, 1e-4: 0.6, 3e-4: 0.5})
    assert list(GRID.runs(known))[3:] == GRID.reported("mrpc", METHOD, 1e-4)
    assert len(list(GRID.least_runs({}))) == 3 + 2


def test_commands_hold_no_folders_of_the_machine(tmp_path):
    (tmp_path / "encoder").mkdir()
    source = Source(str(tmp_path / "encoder"), str(tmp_path / "data"))
    (run,) = GRID.search("mrpc", METHOD, 1e-4)
    assert run.command(source) == run.command(SOURCE)
    assert str(tmp_path) in " ".join(source.options())
    assert source.without_folders(f"No file {source.data}/mrpc") == "No file data/mrpc"


def test_planned_counts():
    pytest.importorskip("matplotlib")
    from benchmarks.glue.experiments import EXPERIMENTS, Settings

    def counts(**changes):
        settings = Settings(SOURCE, **changes)
        runs = {name: list(make(settings).least_runs({})) for name, make in EXPERIMENTS.items()}
        return {
            name: (len(set(found)), sum("--hold-out" in run.options for run in set(found)))
            for name, found in runs.items()
        }

    default = counts()
    assert default["main"] == (3 * 6 * (3 + 5), 3 * 6 * 3)
    assert default["ablations"] == (3 * 5 * (3 + 5), 3 * 5 * 3)
    assert default["transfer"] == (2 * 4 * (3 + 5), 2 * 4 * 3)
    assert default["rates"] == (3 * 2 * 3 * 5, 0)
    assert default["overlap"] == (5 * (1 + 3), 0)
    for settings in (Settings(SOURCE), Settings(SOURCE, rows=None, full=True)):  # a rate is for as many rows, or fewer
        runs = [run for run in EXPERIMENTS["transfer"](settings).least_runs({}) if run.option("--hold-out")]
        assert {run.option("--max-train-examples") for run in runs} == {str(settings.rows or 5000)}
    with pytest.raises(ValueError, match="a task other than mrpc"):
        EXPERIMENTS["probes"](Settings(SOURCE, tasks=("mrpc",)))
    assert counts(full=True, seeds=10, tasks=("cola", "mrpc", "stsb", "rte"))["main"] == (4 * 9 * (3 + 10), 4 * 9 * 3)


def test_pages_can_be_written_before_anything_is_known(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.glue.experiments import EXPERIMENTS, Settings

    for name, make in EXPERIMENTS.items():
        make(Settings(SOURCE)).write({}, tmp_path)
        assert (tmp_path / f"{name}.md").exists()
        assert (tmp_path / f"{name}.svg").exists()
    EXPERIMENTS["main"](Settings(SOURCE, only=("Full",))).write({}, tmp_path)
    with pytest.raises(ValueError, match=r"must name some of Full, CT_D 0\.1, .*; got full"):
        EXPERIMENTS["main"](Settings(SOURCE, only=("full",)))


def test_only_classes_have_a_number_for_no_label(tmp_path):
    pytest.importorskip("scipy")
    from benchmarks.glue.script import glue

    args = glue.parse_arguments().parse_args(["--data", str(tmp_path)])
    for task, labels, kept in (("classes", [0, -1, 2], [0, 2]), ("numbers", [-1.5, 0.0, 2.5], [-1.5, 0.0, 2.5])):
        (tmp_path / task).mkdir()
        rows = "\n".join(json.dumps({"sentence": "a", "label": label}) for label in labels)
        (tmp_path / task / "train.jsonl").write_text(rows)
        args.task = task
        assert glue.read_split(args, "train")["label"][:] == kept


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_pages_are_written_from_the_committed_results(name, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.glue.experiments import EXPERIMENTS, Settings

    settings = Settings(Source("minilm", "data"), **COMMITTED[name])
    EXPERIMENTS[name](settings).write(Results(REPORT / "results.jsonl").read(), tmp_path)
    assert (tmp_path / f"{name}.md").read_text() == (REPORT / f"{name}.md").read_text()


def test_forgetting_shows_every_learning_rate(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.glue.experiments import EXPERIMENTS, Settings

    experiment = EXPERIMENTS["forgetting"](Settings(SOURCE, seeds=2))
    runs = list(experiment.runs({}))
    known = {
        run.command(SOURCE): {
            "seed": int(run.option("--seeds") or 0),
            "metrics": {"new": 40.0 + int(run.option("--seeds") or 0), "old": 90.0},
            "entries": 1234,
        }
        for run in runs[:-2]
    }
    known[runs[-1].command(SOURCE)] = {"error": "MemoryError: no\nmore"}
    experiment.write(known, tmp_path)
    page = (tmp_path / "forgetting.md").read_text()
    assert "| Full | 0.0001 | 41.5 ± 0.7 | 90.0 ± 0.0 | 1,234 |" in page
    assert "| LoRA r=16 | 0.03 | - | - | - |" in page
    assert f"- `{runs[-1].command(SOURCE)}`: MemoryError: no\n" in page


def test_methods_are_compared_where_they_have_learned_as_much():
    pytest.importorskip("matplotlib")
    from benchmarks.glue.trade_off import old_perplexity

    path = [(100.0, 50.0), (64.0, 80.0), (50.0, 90.0), (70.0, 200.0)]  # the last is beyond the best
    assert old_perplexity(path, 80.0) == pytest.approx((50 * 80) ** 0.5)  # 80 is half way in logarithms
    assert old_perplexity(path, 50.0) == pytest.approx(90)
    assert old_perplexity(path, 49.0) is None
    assert old_perplexity(path, 110.0) == pytest.approx(50)


def test_results_are_recorded_once_and_survive_a_torn_line(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    assert results.append({"command": "a", "metrics": {}})
    assert not results.append({"command": "a", "metrics": {"other": 1}})
    with results.file.open("a") as file:
        file.write('{"command": "b", "metr')
    assert results.read().keys() == {"a"}
    assert results.append({"command": "b", "error": "no"})
    assert not results.append({"command": "b"})
    assert results.append({"command": "b"}, replace=True)
    assert not results.append({"command": "b", "error": "late"}, replace=True)
    lines = [json.loads(line) for line in results.file.read_text().splitlines()]
    assert lines == [{"command": "a", "metrics": {}}, {"command": "b", "error": "no"}, {"command": "b"}]


@pytest.fixture
def workplace(tmp_path):
    """A folder with a tiny model and tiny data."""
    save_model(tmp_path / "encoder")
    for task in ("cola", "mrpc", "stsb"):
        save_task(tmp_path / "data", task)
    return tmp_path


def driver(folder, *arguments):
    """The command of a driver, and its environment."""
    places = ["--model", folder / "encoder", "--data", folder / "data", "--output", folder / "runs"]
    command = [sys.executable, "-m", "benchmarks.glue", *arguments, *places, "--epochs", 1, "--processes", 2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return {"args": [*map(str, command)], "cwd": ROOT, "env": environment, "text": True}


def drive(folder, *arguments):
    process = subprocess.run(**driver(folder, *arguments), capture_output=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def lines(folder):
    file = folder / "runs" / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_killed_driver_loses_and_repeats_no_run(workplace):
    grid = ("main", "--tasks", "stsb", "--methods", "Full", "CT_D 0.3", "--seeds", "3", "--max-train-examples", "32")
    with subprocess.Popen(**driver(workplace, *grid), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(lines(workplace)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = lines(workplace)
    assert "another driver" not in drive(workplace, *grid).lower()
    after = lines(workplace)
    commands = [line["command"] for line in after]
    assert after[: len(before)] == before
    assert len(commands) == len(set(commands))
    assert not any("error" in line for line in after)
    assert "0 left" in drive(workplace, *grid, "--plan")
    assert sum("--hold-out" not in command for command in commands) == 2 * 3
    page = (workplace / "runs" / "report" / "main.md").read_text()
    assert "| CT_D 0.3 |" in page
    assert str(workplace) not in page + (workplace / "runs" / "results.jsonl").read_text()

    # The recorded command gives the recorded numbers.
    line = next(line for line in after if "--hold-out" not in line["command"] and "child" in line["command"])
    command = line["command"].split()
    assert command[:2] == ["python", "examples/glue.py"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    again = [sys.executable, ROOT / "examples/glue.py", *command[2:], "--results", "again.jsonl"]
    subprocess.run(again, cwd=workplace, env=environment, check=True, capture_output=True)
    assert json.loads((workplace / "again.jsonl").read_text())["metrics"] == line["metrics"]


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_failed_run_is_recorded_and_only_retried_when_asked(workplace):
    validation = workplace / "data" / "mrpc" / "validation.jsonl"
    rows = validation.read_text()
    validation.write_text("no rows\n")  # the search never reads it
    grid = ("main", "--tasks", "mrpc", "--methods", "Full", "--seeds", "2", "--max-train-examples", "32")
    assert drive(workplace, *grid).count("SystemExit: Each line must be a JSON object") == 2
    failed = [line for line in lines(workplace) if "error" in line]
    assert len(failed) == 2
    assert all(line["error"].startswith("SystemExit: ") for line in failed)
    assert not any("--hold-out" in line["command"] for line in failed)
    assert "Failed runs:" in (workplace / "runs" / "report" / "main.md").read_text()

    validation.write_text(rows)
    count = len(lines(workplace))
    drive(workplace, *grid)
    assert len(lines(workplace)) == count
    drive(workplace, *grid, "--retry")
    retried = lines(workplace)[count:]
    assert {line["command"] for line in retried} == {line["command"] for line in failed}
    assert not any("error" in line for line in retried)
    assert "Failed runs:" not in (workplace / "runs" / "report" / "main.md").read_text()


@pytest.mark.by_hand
@pytest.mark.slow
def test_held_out_rows_are_always_the_same_and_never_trained_on(workplace):
    from benchmarks.glue.script import glue

    held_out = []
    for seed in (1, 2):
        arguments = ["--data", str(workplace / "data"), "--task", "stsb", "--hold-out", "0.25"]
        args = glue.parse_arguments().parse_args(arguments)
        train, validation, _ = glue.load_data(args, seed)
        texts = [set(zip(rows["sentence1"], rows["sentence2"], strict=True)) for rows in (train, validation)]
        assert (len(train), len(validation)) == (30, 10)
        assert not texts[0] & texts[1]
        held_out.append(texts[1])
    assert held_out[0] == held_out[1]


@pytest.mark.by_hand
@pytest.mark.slow
def test_every_experiment_writes_its_page(workplace):
    for task in ("mnli", "snli", "sick"):
        save_task(workplace / "data", task)
    controls = ("Lowest Fisher", "Authors' Fisher", "Pruned to the child", "32 examples", "Untrained")
    experiments = ("ablations", "examples", "transfer", "probes", "overlap")
    drive(workplace, *experiments, "--tasks", "mrpc", "stsb", "--methods", "Full", "CT_D 0.3", *controls,
          "--seeds", "2", "--max-train-examples", "32")  # fmt: skip
    assert not [line["error"] for line in lines(workplace) if "error" in line]
    report = workplace / "runs" / "report"
    for name in experiments:
        page = (report / f"{name}.md").read_text()
        assert "| - |" not in page
        assert (report / f"{name}.svg").stat().st_size > 5_000
    untrained = [line for line in lines(workplace) if "--untrained" in line["command"]]
    assert [(line["entries"], line["settings"]["epochs"]) for line in untrained] == [(0, 0)] * 2
    (again, _) = (line["overlaps"] for line in lines(workplace) if "--others" in line["command"])
    assert again.keys() == {"tasks", "rows", "head", "both"}


@pytest.mark.by_hand
@pytest.mark.slow
def test_controls_choose_as_they_say(workplace):
    import torch
    from peft import get_peft_model
    from torch.utils.data import DataLoader

    from benchmarks.glue import variants
    from peft_child import ChildTuningConfig
    from peft_child.layers.layer import child_tuning_layers

    from .helpers import assert_same, child_of
    from .problems import bert_batch, tiny_bert

    rows = [{name: tensor[index] for name, tensor in bert_batch().items()} for index in range(4)]
    args = variants.glue.parse_arguments().parse_args([])
    children, models = {}, {}
    for name in ("highest", "lowest", "pruned"):
        torch.manual_seed(0)
        config = ChildTuningConfig(density=0.3, target_modules="all-linear", task_type="SEQ_CLS")
        models[name] = get_peft_model(tiny_bert(), config)
        variants.CHOICES[name](models[name], DataLoader(rows), args)
        children[name] = child_of(models[name])
    both = children["lowest"].keys() & children["highest"].keys()
    assert not any(np.isin(children["lowest"][name], children["highest"][name]).any() for name in both)
    assert_same(children["pruned"], children["highest"])
    whole, pruned = (child_tuning_layers(models[name]) for name in ("highest", "pruned"))
    for path, layer in pruned.items():
        for parameter, tensor in layer.base_layer.named_parameters():
            expected = torch.zeros(tensor.numel())
            kept = children["pruned"].get(layer.targets_of("default")[parameter], torch.tensor([], dtype=torch.long))
            expected[kept] = getattr(whole[path].base_layer, parameter).flatten()[kept]
            assert torch.equal(tensor.flatten(), expected)


@pytest.mark.by_hand
@pytest.mark.slow
def test_forgetting_adapts_one_base_in_every_way(tmp_path):
    small = ("--pretrain-steps", 3, "--steps", 2, "--hidden-size", 32, "--documents", 8, "--bases", tmp_path)
    command = [sys.executable, "-m", "benchmarks.glue.forgetting", *map(str, small), "--output", str(tmp_path / "out")]
    results = {}
    for method in ("base", "child", "task_free"):
        process = subprocess.run([*command, "--method", method], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        results[method] = json.loads(process.stdout.splitlines()[-1])
    assert results["base"]["entries"] == 0
    assert results["child"]["entries"] < results["task_free"]["entries"]
    assert results["child"]["metrics"] != results["base"]["metrics"]
