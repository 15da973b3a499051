"""Files written piece by piece have the very bytes that they would have at once."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from peft_child.files.safetensors_io import TensorWriter, copy_bytes


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool]


def written(file, tensors):
    with TensorWriter(file) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return file.read_bytes()


@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    )
)
def test_the_bytes_are_those_of_the_library(tmp_path_factory, tensors):
    tensors = {name: (torch.rand(shape) * 9).to(dtype) for name, (dtype, shape) in tensors.items()}
    folder = tmp_path_factory.mktemp("files", numbered=True)
    assert written(folder / "ours", tensors) == save(tensors, {"format": "pt"})
    assert [file.name for file in folder.iterdir()] == ["ours"]


def test_a_tensor_larger_than_a_piece(tmp_path):
    tensors = {"b": torch.randn(300, 1000), "a": torch.randn(1000, 300).t(), "c": torch.arange(7).byte()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert written(tmp_path / "ours", tensors) == (tmp_path / "theirs").read_bytes()


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    def fail():
        with TensorWriter(tmp_path / "file") as writer:
            writer.add("a", torch.ones(3))
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_source_that_ends_too_early(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    with (tmp_path / "short").open("rb") as source, pytest.raises(OSError, match="short' ends before its tensors do"):
        copy_bytes(source, io.BytesIO(), 4)
