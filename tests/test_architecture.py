"""The structure of the package: imports point one way, and what is public is documented."""

import ast
from pathlib import Path

import pytest

import peft_child


LAYERS = [
    {"front_matter", "lazy", "plot", "quantised", "reading", "streaming", "unheld"},
    {"card", "ranks"},
    {"mask", "codec", "selection", "fisher", "batches", "checkpoint", "example_gradients", "weighing"},
    {"compose", "config", "hooks", "index_buffers", "mask_buffers", "sharded", "sparse_file", "module_gradients"},
    {"delta", "taps"},
    {"storage", "batched", "weighted_sum"},
    {"layer", "adapter_folder"},
    {"targets", "scoring", "files", "combination", "extraction", "merging", "locate", "summary", "whole_model"},
    {"surgery", "choice", "terminal", "hub"},
    {"model", "thinning"},
    {"registration", "cli", "callback"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(Path(peft_child.__file__).parent.glob("[!_]*.py"))


def imported_modules(source):
    """Modules of this package that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found.add(node.module if node.module != "peft_child" else f"peft_child.{node.names[0].name}")
    return {name.split(".")[1] for name in found if name.startswith("peft_child.")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_imports_point_down(source):
    assert all(RANK[name] < RANK[source.stem] for name in imported_modules(source))


def test_every_module_has_a_layer():
    assert {path.stem for path in SOURCES} == set(RANK)


@pytest.mark.parametrize(
    "name",
    ["compose", "codec", "example_gradients", "fisher", "delta", "mask", "selection", "sparse_file", "weighted_sum"],
)
def test_tensor_functions_know_neither_peft_nor_transformers(name):
    source = Path(peft_child.__file__).with_name(f"{name}.py").read_text()
    assert "import peft" not in source
    assert "from peft " not in source
    assert "transformers" not in source


def test_public_names_are_documented():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name in peft_child.__all__:
        documentation = getattr(peft_child, name).__doc__ or ""
        assert documentation
        assert not documentation.startswith(f"{name}("), f"{name} has only what NamedTuple or dataclass wrote"
        if name[0].islower() or name.endswith("Config"):
            assert name in readme
