import json

import pytest
from peft import PeftConfig

from peft_child import ChildPeftType, ChildTuningConfig


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf"), "0.1", None, True])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\], got"):
        ChildTuningConfig(density=density)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "d"}, "variant must be one of 'task_driven', 'random', 'task_free', 'extracted', got 'd'"),
        ({"variant": "CT_F"}, "variant='CT_F' is called 'task_free' here"),
        ({"variant": "task_free", "gradient_density": 0.5}, "for variant='task_free' set density instead, got .*=0.5"),
        ({"gradient_density": 0}, r"gradient_density must be a number in \(0, 1\], got 0"),
        ({"resample_every": 0}, "resample_every must be a positive integer, got 0"),
        ({"resample_every": True}, "resample_every must be a positive integer, got True"),
        ({"fisher": "exact"}, "fisher must be one of 'per_example', 'authors', got 'exact'"),
        ({"delta_dtype": "int8"}, "delta_dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"check_base": "no"}, "check_base must be one of 'warn', 'error', 'off', got 'no'"),
        ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*63 - 1, got -1"),
        ({"seed": 1 << 63}, "seed must be an integer"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"init_weights": "no"}, "init_weights must be True or False, got 'no'"),
        ({"labels": ["no", 1]}, r"labels must be a list of names or None, got \['no', 1\]"),
        ({"fisher_examples": 0}, "fisher_examples must be a positive integer or None, got 0"),
        ({"target_modules": 3}, "target_modules must be a list of names or a regular expression, got 3"),
        ({"target_parameters": [1]}, "target_parameters must be a list of names or a regular expression"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names, got 'classifier'"),
        (
            {"layers_pattern": "layer"},
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified",
        ),
        ({"target_modules": ".*q", "layers_to_transform": ["0"]}, "cannot be used when `target_modules` is a str"),
        ({"target_modules": "("}, r"target_modules must be a valid regular expression, got '\(': missing"),
        ({"layers_to_transform": "0"}, "must be non-negative integers, at least one, got '0'"),
        ({"layers_to_transform": []}, r"must be non-negative integers, at least one, got \[\]"),
        ({"layers_to_transform": [-1]}, "must be non-negative integers"),
        ({"layers_to_transform": True}, "must be non-negative integers"),
        ({"target_parameters": ["a"], "layers_to_transform": [0]}, "needs a list of target_modules"),
        ({"child_sizes": {"a": [3, 4, 5]}}, r"child_sizes of 'a' must be \[entries, .*got \[3, 4, 5\]"),
        ({"child_sizes": {"a": [3, 1]}}, "child_sizes of 'a'"),
        ({"child_sizes": 3}, "child_sizes must map names"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ChildTuningConfig(**changes)


def test_round_trip_through_json(tmp_path):
    config = ChildTuningConfig(
        variant="random",
        density=0.25,
        target_modules=["b", "a"],
        target_parameters=".*norm.*",
        exclude_modules=["c"],
        layers_to_transform=[0, 1],
        layers_pattern="layer",
        modules_to_save=["head"],
        seed=3,
        fisher="authors",
        fisher_examples=7,
        labels=["no", "yes"],
        init_weights=False,
        child_sizes={"x.weight": [10, 2, 40]},
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEFT_CHILD"


def test_sets_are_saved_in_a_fixed_order(tmp_path):
    config = ChildTuningConfig(target_modules=["a", "b", "c"])
    config.target_modules = {"c", "a", "b"}
    assert config.to_dict()["target_modules"] == ["a", "b", "c"]


def test_size_of_the_child():
    assert ChildTuningConfig(density=0.1).child_size(1004) == 100
    assert ChildTuningConfig(density=1).child_size(7) == 7
    with pytest.raises(ValueError, match=r"density=0.001 of 100 targeted entries is an empty child network"):
        ChildTuningConfig(density=0.001).child_size(100)


def test_every_field_is_described():
    description = ChildTuningConfig.describe()
    assert all(f"{name} = " in description for name in ChildTuningConfig.__annotations__)
    assert ChildTuningConfig().peft_type is ChildPeftType.PEFT_CHILD


def test_lists_of_modules_become_sets_as_in_peft():
    config = ChildTuningConfig(target_modules=["b", "a", "b"], exclude_modules=["c"])
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})
    assert config.to_dict()["target_modules"] == ["a", "b"]
