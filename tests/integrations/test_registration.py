import importlib
import subprocess
import sys

import pytest
from peft import PeftModel, mapping
from transformers.utils.hub import PushToHubMixin

import peft_child
from peft_child import ChildPeftType, ChildTuningConfig, ChildTuningModel
from peft_child.integrations.registration import register


@pytest.mark.smoke
def test_peft_knows_the_method_by_its_name():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PEFT_CHILD"] is ChildTuningConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["PEFT_CHILD"] is ChildTuningModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["PEFT_CHILD"] == "child_"


def test_registering_again_changes_nothing():
    push = PeftModel.push_to_hub
    register()
    importlib.reload(peft_child)
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PEFT_CHILD"] is ChildTuningConfig
    assert PeftModel.push_to_hub is push


def test_what_replaces_a_method_can_be_told_from_it():
    push = PushToHubMixin.push_to_hub
    assert PeftModel.push_to_hub is push
    assert push.__wrapped__.__module__ == PushToHubMixin.__module__
    assert not hasattr(push.__wrapped__, "__wrapped__")
    assert "push_to_hub" not in vars(PeftModel)


def test_a_clash_of_names_or_prefixes_is_refused(monkeypatch):
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, ChildPeftType.PEFT_CHILD, type("Other", (), {}))
    with pytest.raises(RuntimeError, match=r"PEFT already has a method 'PEFT_CHILD'.*Other"):
        register()
    monkeypatch.undo()
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_PREFIX_MAPPING, "OTHER", "child_")
    with pytest.raises(RuntimeError, match="prefix 'child_' already belongs to PEFT's method 'OTHER'"):
        register()


@pytest.mark.smoke
def test_without_the_package_the_error_names_it(tmp_path):
    ChildTuningConfig().save_pretrained(tmp_path)
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    error = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True).stderr
    assert error.strip().endswith("KeyError: 'PEFT_CHILD'")
