"""The examples run as their users run them, small."""

import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from benchmarks.grid.scripts import load

from .glue_data import save_model, save_task
from .ranks import forked
from .sft_data import save_language_model, save_rows


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"glue": "sklearn", "sft": "trl"}
TRL_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def script(name):
    """An example as a module."""
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    return load(name)


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "it/s" not in process.stderr  # progress bars are for terminals
    return process.stdout


def run_here(name, arguments, connection):
    sys.argv = [name, *arguments]
    error = None
    with redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(EXAMPLES / name, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    connection.send((error, printed.getvalue()))


def run_forked(name, *arguments):
    """What `run(name, ...)` prints, without the ten seconds that a new process takes to import everything."""
    process, connection = forked(run_here, name, list(map(str, arguments)))
    error, printed = connection.recv()
    process.join()
    assert error is None, error
    return printed


def test_quickstart(tmp_path):
    printed = run("quickstart.py", "--tiny", "--output", tmp_path)
    assert "same logits, bit for bit, loaded into a fresh base and merged into it" in printed
    rows = [line for line in printed.splitlines() if line.startswith(("Base", "Full", "Child", "LoRA"))]
    assert len(rows) == 4
    for picture in ("child_network.png", "perplexities.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    child, full = (
        (tmp_path / folder).stat().st_size for folder in ("child/adapter_model.safetensors", "full/model.safetensors")
    )
    assert child < full / 3
    own = tmp_path / "own.txt"
    own.write_text("A model of one's own, on one's own text. " * 300)
    again = run(
        "quickstart.py", "--tiny", "--model", tmp_path / "base", "--new-text", own, "--output", tmp_path / "again"
    )
    assert "same logits, bit for bit" in again


@pytest.mark.parametrize(
    ("method", "task", "metrics"),
    [
        ("child", "mrpc", {"accuracy", "f1"}),
        ("full", "stsb", {"pearson", "spearman"}),
        ("lora", "cola", {"matthews"}),
        ("shira", "mnli", {"accuracy"}),
        ("task_free", "snli", {"accuracy"}),
        ("random", "mine", {"accuracy"}),
    ],
)
def test_glue(tmp_path, method, task, metrics):
    save_model(tmp_path / "encoder")
    save_task(tmp_path / "data", task)
    run_example = partial(run, "glue.py") if method == "child" else partial(run_forked, "glue.py")
    printed = run_example(
        "--model", tmp_path / "encoder", "--data", tmp_path / "data", "--task", task, "--method", method,
        "--epochs", 1, "--seeds", 1, 2, "--bf16", "--results", tmp_path / "results.jsonl",
        "--output", tmp_path / "out",
    )  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["seed"] for result in results] == [1, 2]
    assert all(set(result["metrics"]) == metrics for result in results)
    assert all(f"{name}: " in printed for name in metrics)
    assert ("child network: " in printed) == (method == "child")
    assert ("labels: no, yes\n" in printed) == (task == "mine")
    saved = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert results[-1]["bytes"] == saved.stat().st_size
    assert (results[-1]["settings"]["model"], results[-1]["settings"]["data"]) == ("encoder", "data")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("child", ["--variant", "task_driven", "--granularity", "input_channel", "--chat"]),
        ("child", []),
        ("full", []),
        ("lora", ["--rank", 2]),
        ("shira", []),
    ],
)
def test_sft(tmp_path, method, more):
    pytest.importorskip("trl", reason="TRL is not installed")
    save_language_model(tmp_path / "model")
    save_rows(tmp_path / "data", "copy", ("question", "answer"))
    printed = run_forked(
        "sft.py",
        "--model", tmp_path / "model", "--data", tmp_path / "data" / "copy", "--columns", "question", "answer",
        "--method", method, "--steps", 4, "--evaluate-every", 2, "--learning-rate", 0.03, "--max-length", 24,
        "--held-out-old", 1, "--results", tmp_path / "results.jsonl", "--output", tmp_path / "out", *more,
    )  # fmt: skip
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert [step for step, *_ in result["curve"]] == [0, 2, 4]
    assert result["curve"][-1][1:] == [result["metrics"]["new"], result["metrics"]["old"]]
    assert result["curve"][-1][1] != result["curve"][0][1]
    saved = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert result["bytes"] == saved.stat().st_size
    assert f"{result['entries']:,} trained values" in printed
    assert ("child network: " in printed) == ("task_driven" in more)
    assert str(tmp_path) not in json.dumps(result)


def test_sft_of_a_single_file_with_its_own_old_text(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    save_language_model(tmp_path / "model")
    rows = [
        {"text": f"w{number % 40}\N{LINE SEPARATOR}w{number % 7}"} for number in range(60)
    ]  # not the end of a line
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    (tmp_path / "old.txt").write_text("w1 w2 w3 " * 300)
    arguments = ["--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--old-text", tmp_path / "old.txt"]
    run_forked(
        "sft.py", *arguments, "--steps", 1, "--results", tmp_path / "results.jsonl", "--output", tmp_path / "out"
    )
    settings = json.loads((tmp_path / "results.jsonl").read_text())["settings"]
    assert (settings["data"], settings["old_text"]) == (["rows.jsonl"], ["old.txt"])
    assert settings["variant"] == "random"


def test_sft_says_what_is_wrong_with_its_options(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    save_language_model(tmp_path / "model")
    save_rows(tmp_path / "data", "copy", ("question", "answer"))
    arguments = ["--model", tmp_path / "model", "--data", tmp_path / "data" / "copy", "--columns", "question", "text"]
    with pytest.raises(AssertionError, match=r"columns of the rows, \['question', 'answer'\]; got text"):
        run_forked("sft.py", *arguments)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(AssertionError, match=r"model' has no chat template, so leave --chat out"):
        run_forked("sft.py", *arguments, "--chat")


def test_glue_keeps_the_largest_changes(tmp_path):
    save_model(tmp_path / "encoder")
    save_task(tmp_path / "data", "mrpc")
    run_forked(
        "glue.py",
        "--model", tmp_path / "encoder", "--data", tmp_path / "data", "--method", "task_free",
        "--epochs", 1, "--keep", 0.3, 0.1, "--results", tmp_path / "results.jsonl", "--output", tmp_path / "out",
    )  # fmt: skip
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert list(result["kept"]) == ["0.3", "0.1"]
    assert result["entries"] == 406 + 34  # a tenth of the targeted entries, and the head


@TRL_WARNS
@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ("", 1e-3),
        ("--density 0.01", 1e-2),
        ("--variant task_driven", 3e-4),
        ("--variant task_driven --density 0.01", 1e-3),
        ("--variant task_free", 1e-4),
        ("--method lora", 1e-3),
        ("--learning-rate 0.5", 0.5),
    ],
)
def test_sft_has_the_usual_learning_rate_of_a_method(options, rate):
    sft = script("sft")
    args = sft.parse_arguments().parse_args(["--data", "rows.jsonl", *options.split()])
    assert sft.with_learning_rate(args).learning_rate == rate


@TRL_WARNS
@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na,1\n", r"must be a JSON object, .* got 'text,label' in line 1 of '.*rows\.csv'"),
        (b'[{"text": "a"}]', r"must be a JSON object, .* in line 1 of"),
        (b'{"text": "a"}\n\n{"text": \n', r"must be a JSON object, .* got '\{\"text\":' in line 3 of"),
        (b'{"text": "a"}\n{"text": "\xe9"}', r"must be a JSON object, .* in line 2 of"),
        (b"\n", r"'.*rows\.csv' has no rows"),
        (b'{"text": "a"}\n{"text": 1}', r"must have values of one kind; in '.*rows\.csv'"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path, name, content, message):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        script(name).read(tmp_path / "rows.csv")


@TRL_WARNS
def test_sft_says_what_data_can_be(tmp_path):
    sft = script("sft")
    (tmp_path / "folder").mkdir()
    for data, missing in (("rows.csv", "rows.csv"), ("folder", "folder/train.jsonl")):
        args = sft.parse_arguments().parse_args(["--data", str(tmp_path / data)])
        with pytest.raises(SystemExit, match=f"must be a JSONL file, a folder .* there is no file '.*{missing}'"):
            sft.load_rows(args)


def glue_rows(folder, train, validation, *options):
    """What `glue.py` trains on and evaluates on, of rows as dictionaries."""
    (folder / "mine").mkdir()
    for split, rows in (("train", train), ("validation", validation)):
        (folder / "mine" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    glue = script("glue")
    args = glue.parse_arguments().parse_args(["--data", str(folder), "--task", "mine", *options])
    return glue.load_data(args, seed=0)


def labelled(*labels, **more):
    return [{"text": f"{number}", "label": label, **more} for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([1, 0, 2, 0], ["0", "1", "2"], [1, 0, 2, 0]),
        ([10, 2, -1, 10], ["2", "10"], [1, 0, 1]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        (["no", "10", "2"], ["10", "2", "no"], [2, 0, 1]),
        ([0.5, -1, 2], None, [0.5, -1.0, 2.0]),
    ],
)
def test_glue_counts_classes_and_keeps_their_names(tmp_path, labels, names, numbers):
    rows, others, count = glue_rows(tmp_path, labelled(*labels), labelled(labels[0]))
    assert [label for _, label in sorted(zip(rows["text"], rows["label"], strict=True))] == numbers
    assert others["label"][:] == numbers[:1]
    assert count == (len(names) if names else 1)
    assert getattr(rows.features["label"], "names", None) == names


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            [{"text": "a", "id": 1}],
            [],
            r"names or numbers in a column 'label'; .*train\.jsonl' has text \(string\), id",
        ),
        (labelled(0, None), [], r"must have a 'label'; row 2 of '.*train\.jsonl' has none"),
        (labelled([1], [2]), [], r"names or numbers in a column 'label'"),
        (labelled(1, 1), [], r"two different labels or more in the training rows; got 1"),
        (labelled(-1, 1), [], r"two different labels or more in the training rows; got 1"),
        (labelled(0, -2), [], r"0 or more, or -1 for no label; got -2 in '.*train\.jsonl'"),
        (labelled("a", "b"), labelled("a", "c"), r"among those of the training rows, a, b; got c"),
        (labelled(0, 1), labelled(2), r"among those of the training rows, 0, 1; got 2"),
        (labelled(0.5, 1), labelled("a"), r"must be numbers, as those of the training rows; got string"),
        (labelled(0, 1), [{"other": "a", "label": 1}], r"must have the same texts; got text and other"),
        (labelled(0, 1, id="a", url="b"), [], r"got text, id, url in '.*train\.jsonl', .*with --columns"),
        ([{"id": 1, "label": 0}], [], r"got none in '.*train\.jsonl', which has id \(int64\), label"),
    ],
)
def test_glue_says_what_is_wrong_with_rows(tmp_path, train, validation, message):
    with pytest.raises(SystemExit, match=message):
        glue_rows(tmp_path, train, validation or train)


def test_glue_reads_the_columns_that_are_named(tmp_path, capsys):
    rows = [{"id": "x", "b": "second", "label": number, "a": "first"} for number in (0, 1)]
    data, _, _ = glue_rows(tmp_path, rows, rows, "--columns", "a", "b")
    assert data.column_names == ["a", "b", "label"]
    assert capsys.readouterr().out == "texts: a, b\nlabels: 0, 1\n"
    for number, columns in enumerate((["a", "text"], ["label"], ["a", "b", "id"])):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(SystemExit, match=f"got {', '.join(columns)} in .*which has id .string., b"):
            glue_rows(tmp_path / str(number), rows, rows, "--columns", *columns)


def test_glue_says_which_files_it_needs(tmp_path):
    args = script("glue").parse_arguments().parse_args(["--data", str(tmp_path), "--task", "mine"])
    with pytest.raises(SystemExit, match=r"TASK/validation\.jsonl; there is no file '.*mine/train\.jsonl'"):
        script("glue").load_data(args, seed=0)


@pytest.mark.parametrize("method", ["child", "full"])
def test_glue_saves_the_names_of_the_labels_and_the_tokenizer(tmp_path, method):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    from peft_child import ChildTuningConfig

    save_model(tmp_path / "encoder")
    (tmp_path / "mine").mkdir()
    for split in ("train", "validation"):
        rows = [{"text": "the cat sat", "label": label} for label in ("good", "bad", "neither")] * 4
        (tmp_path / "mine" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_forked(
        "glue.py",
        "--model", tmp_path / "encoder", "--data", tmp_path, "--task", "mine", "--method", method, "--epochs", 1,
        "--output", tmp_path / "out",
    )  # fmt: skip
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    else:
        labels = dict(enumerate(ChildTuningConfig.from_pretrained(tmp_path / "out").labels))
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", id2label=labels)
        model = PeftModel.from_pretrained(base, tmp_path / "out")
    classify = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "out"), top_k=None
    )
    assert {found["label"] for found in classify(["the cat sat"])[0]} == {"good", "bad", "neither"}


@TRL_WARNS
@pytest.mark.parametrize("name", NEEDS)
def test_output_is_replaced_by_its_like_alone(tmp_path, capsys, name):
    example = script(name)

    def check(method):
        data = ["--data", "rows.jsonl"]
        args = example.parse_arguments().parse_args([*data, "--method", method, "--output", str(tmp_path)])
        example.check_output(args)
        return capsys.readouterr().out

    assert check("child") == check("full") == ""
    (tmp_path / "adapter_config.json").touch()
    assert "an adapter, which will be replaced" in check("lora")
    with pytest.raises(SystemExit, match="must not mix a whole model with an adapter"):
        check("full")
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    assert "a whole model, which will be replaced" in check("full")
    with pytest.raises(SystemExit, match="must not mix an adapter with a whole model"):
        check("child")
