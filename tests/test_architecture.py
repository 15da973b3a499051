"""The structure of the package: rooms that depend one way, small files, one meaning for a name, documented names."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.version import Version

import peft_child


ROOT = Path(peft_child.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
TREES = {source: ast.parse(source.read_text()) for source in SOURCES}

# Each imports only what stands before it.
ROOMS = ["tensors", "card", "files", "layers", "tuner", "selection", "integrations", "cli"]
MODULES = {
    "tensors": [
        *(
            "lazy",
            "quantised",
            "partitioned",
            "topk",
            "channels",
            "delta",
            "codec",
            "distributed",
            "sharded_topk",
            "combine",
        ),
        *("gradient_mask", "mask_steps", "compose", "channel_linear", "composed_on_use"),
    ],
    "layers": ["granularity", "packed", "unheld", "buffers", "state", "loading", "merging", "mixed_batch", "layer"],
    "tuner": ["mask_hooks", "config", "targets", "drawing", "injection", "state_dict", "model"],
}
LONG = {
    "tensors/codec.py": "four encodings, each with its checks",
    "tuner/model.py": "all that PEFT asks of a tuner",
    "layers/state.py": "the tensors of a layer and every change of them",
    "selection/select.py": "two public functions with their documentation",
    "cli/main.py": "the options of seven commands, each with its help",
}

# Private names of torch, peft and transformers by file, each with the reason why there is no public way.
PRIVATE = {
    "integrations/vllm_unpacked.py": {
        "_custom_ops": "vLLM has no option to keep weights unpacked",
        "_supports_onednn": "as _custom_ops",
    },
    "integrations/hub.py": {"_hf_peft_config_loaded": "whether transformers' own adapter API saves an adapter"},
    "selection/batches.py": {"torch.utils._pytree": "tensors in nested batches; torch.utils has no public one"},
    "selection/capture.py": {
        "_backward_hooks": "hooks that change the gradient of a weight",
        "_has_any_global_hook": "hooks of all modules, which run before ours",
        "_parameters": "parameters that a module itself owns, by key",
        "torch.utils._python_dispatch": "weights that are used without a call of their module",
        "torch.utils._pytree": "tensors in the arguments of a call",
    },
    "selection/module_gradients.py": {
        "_parameters": "the parameter of a second run, by key",
        "torch.utils._pytree": "tensors in the arguments of a call",
    },
    "tensors/channel_linear.py": {
        "_old_forward": "the forward that accelerate has wrapped, which loads what is offloaded",
        "_backward_hooks": "hooks, which the module itself would run",
        "_backward_pre_hooks": "as _backward_hooks",
        "_forward_hooks": "as _backward_hooks",
        "_forward_pre_hooks": "as _backward_hooks",
        "_has_any_global_hook": "hooks of all modules, which the module itself would run",
    },
    "tensors/quantised.py": {"_make_wrapper_subclass": "a tensor that has metadata and no memory"},
    "tensors/compose.py": {
        "_C": "see _top_saved_tensors_default_hooks",
        "_autograd": "see _top_saved_tensors_default_hooks",
        "_init_flat_weights": "recurrent layers keep the tensors that they ran with",
        "_parameters": "tensors in place of parameters for one call, faster than functional_call",
        "_top_saved_tensors_default_hooks": "hooks of activation checkpointing around ours, which replace them",
        "_version": "in-place changes, of composed tensors, of what they are composed from, and of buffers",
    },
    "tensors/composed_on_use.py": {
        "_C": "torch functions without the subclass, to ask for metadata",
        "_disabled_torch_function_impl": "a subclass that torch's fast paths take for a tensor",
        "_make_wrapper_subclass": "a tensor that has metadata and no memory",
        "torch.utils._pytree": "our tensors in the arguments of a torch function",
    },
    "layers/buffers.py": {
        "_load_from_state_dict": "the hook of nn.Module before tensors are loaded",
        "peft.tuners._buffer_dict": "buffers by adapter that PEFT's state dicts know",
    },
    "tuner/injection.py": {
        "_ddp_params_and_buffers_to_ignore": "where DDP looks for buffers that it need not broadcast",
        "_modules": "a module in every place where another one stands",
    },
    "layers/loading.py": {
        "_load_from_state_dict": "the hook of nn.Module before tensors are loaded",
        "_save_to_state_dict": "the hook of nn.Module before tensors are collected",
    },
    "layers/packed.py": {
        "_get_in_out_features": "PEFT's in_features and out_features",
        "_hooks": "endings of the attributes with a module's hooks, for the copy that PEFT makes without them",
        "_hf_hook": "where accelerate says on which device an offloaded module runs",
        "_parameters": "parameters that a module itself owns, by key",
    },
    "layers/layer.py": {
        "_ddp": "marks that others set are about the layer itself",
        "_external_params": "as _ddp, of DeepSpeed",
        "_fsdp": "as _ddp",
        "_hf_": "as _ddp",
        "_is_fsdp": "as _ddp",
        "_is_hf_": "as _ddp",
        "_is_replica": "what nn.DataParallel marks its copies with",
        "_modules": "base_layer while __init__ has not come to it",
        "_old_forward": "as _ddp",
        "_parameters": "parameters that the base layer itself owns, by key",
        "_z3_leaf": "as _ddp, of DeepSpeed",
    },
    "tuner/mask_hooks.py": {"_backward_hooks": "whether a tensor is masked already"},
    "layers/mixed_batch.py": {"torch.utils._pytree": "tensors in the arguments of a call"},
    "tuner/model.py": {
        "_cast_adapter_dtype": "overridden: deltas stay float32",
        "_check_merge_allowed": "overridden: tied weights can be merged",
        "_check_target_module_exists": "overridden: modules were planned before",
        "_check_tied_modules": "overridden: tied weights share a delta",
        "_create_and_replace": "overridden: how a tuner makes its layers",
        "_get_adapter_state_dict": "overridden: what is saved",
        "_inject_parameters": "overridden: parameters were planned with the modules",
        "_load_from_state_dict": "the hook of nn.Module before tensors are loaded",
        "_prepare_adapter_config": "overridden: parameters alone may be targeted",
        "_prepare_model": "overridden: PEFT's hook before injection",
        "_remap_adapter_state_dict_for_load": "overridden: what is loaded",
        "_replace_module": "overridden: heads of any kind",
        "_unload_and_optionally_merge": "overridden: layers inside layers",
    },
    "layers/state.py": {
        "_modules": "deltas of an adapter, without an error where there are none",
        "_move_adapter_to_device_of_base_layer": "overridden: deltas keep their precision",
        "_parameters": "parameters that the base layer itself owns, by key",
    },
    "tuner/state_dict.py": {"_parameters": "base weights in a state dict, by key"},
    "tuner/targets.py": {
        "_ExcludedModule": "what PEFT's matching returns for excluded modules",
        "_modules": "children under every name that they have",
        "torch.utils._python_dispatch": "whether a weight is packed",
    },
}
HARMLESS = {"_replace", "_asdict", "_fields"}  # public parts of NamedTuple


def path_of(source):
    return source.relative_to(ROOT).as_posix()


def imports_of(source):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(TREES[source]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module


def own_imports(source):
    """Room and module of what a file imports from this package."""
    return {tuple(name.split(".")[1:]) for name in imports_of(source) if name.startswith("peft_child.")}


@pytest.mark.parametrize("source", [source for source in SOURCES if source.parent != ROOT], ids=path_of)
def test_rooms_and_modules_import_what_stands_before_them(source):
    room, module = source.parent.name, source.stem
    for other, *rest in own_imports(source):
        assert ROOMS.index(other) <= ROOMS.index(room)
        if other == room and room in MODULES:
            order = MODULES[room]
            assert order.index(rest[0]) < order.index(module)


@pytest.mark.parametrize("room", ROOMS)
def test_no_modules_of_a_room_import_each_other(room):
    graph = {
        source.stem: {name[1] for name in own_imports(source) if name[0] == room and len(name) > 1}
        for source in (ROOT / room).glob("*.py")
        if source.stem != "__init__"
    }
    assert list(TopologicalSorter(graph).static_order())
    if room in MODULES:
        assert graph.keys() == set(MODULES[room])


def test_all_code_is_in_a_room():
    assert {source.name for source in ROOT.glob("*.py")} == {"__init__.py"}
    assert {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists()} == set(ROOMS)


@pytest.mark.parametrize("room", ["tensors", "card", "files"])
def test_tensors_cards_and_files_know_neither_peft_nor_transformers(room):
    imported = {name.split(".")[0] for source in (ROOT / room).glob("*.py") for name in imports_of(source)}
    assert imported
    assert not imported & {"peft", "transformers"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


@cache
def own_names():
    """Private names that this package gives to things of its own."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
                found |= {
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
        found |= {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    return found


def overridden(source):
    """Private names that classes of a file have from classes of other packages."""
    name = ".".join(source.relative_to(ROOT.parent).with_suffix("").parts)
    if not any(name == found.name for found in pkgutil.walk_packages(peft_child.__path__, "peft_child.")):
        return
    if name.startswith("peft_child.integrations.vllm"):  # which cannot be imported without vLLM
        return
    module = importlib.import_module(name)
    for kind in vars(module).values():
        if inspect.isclass(kind) and kind.__module__ == name:
            foreign = [
                base
                for base in kind.__mro__[1:]
                if base.__module__.split(".")[0] in ("torch", "peft", "transformers") and base.__module__ != "torch._C"
            ]
            yield from (key for key in vars(kind) if is_private(key) and any(key in vars(base) for base in foreign))


def private_names(source):
    own = own_names()
    for node in ast.walk(TREES[source]):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("peft_child"):
            if any(is_private(part) for part in node.module.split(".")):
                yield node.module
            yield from (alias.name for alias in node.names if is_private(alias.name))
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text.isidentifier() and is_private(text) and text.strip("_") not in ("", "i", "set") and text not in own:
            yield text
    yield from overridden(source)


@pytest.mark.parametrize("source", SOURCES, ids=path_of)
def test_private_names_of_other_packages_are_listed_with_a_reason(source):
    generated = {"_abc_impl", "_backward_cls"}  # by Python's and torch's metaclasses
    found = set(private_names(source)) - HARMLESS - generated
    assert found == PRIVATE.get(path_of(source), {}).keys()
    assert all(PRIVATE.get(path_of(source), {}).values())


def test_top_level_names_are_unique():
    names = Counter()
    for tree in TREES.values():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] += 1
            for target in node.targets if isinstance(node, ast.Assign) else ():
                names.update([target.id] if isinstance(target, ast.Name) else ())
    assert not {name for name, count in names.items() if count > 1 and name[0] != "_" and name != "T"}


@pytest.mark.parametrize("source", SOURCES, ids=path_of)
def test_only_layers_reach_into_layers(source):
    inside = ("layers/layer.py", "layers/loading.py", "layers/merging.py", "layers/state.py", "layers/buffers.py")
    found = {
        node.attr
        for node in ast.walk(TREES[source])
        if isinstance(node, ast.Attribute) and node.attr.startswith("child_")
    }
    assert path_of(source) in inside or not found - {"child_size", "child_sizes"}  # of the configuration


def test_folders_and_files_are_small():
    for room in ROOMS:
        limit = {"tensors": 15}.get(room, 12)  # each of them is a subject of its own
        assert len(list((ROOT / room).glob("[!_]*.py"))) <= limit
    long = {path_of(source) for source in SOURCES if len(source.read_text().splitlines()) > 300}
    assert long == LONG.keys()


def test_every_module_has_a_test_file_of_its_name():
    tests = ROOT.parent / "tests"
    modules = [source for source in SOURCES if source.parent != ROOT and source.stem != "__init__"]
    missing = [
        path_of(source) for source in modules if not (tests / source.parent.name / f"test_{source.name}").exists()
    ]
    assert not missing


def test_public_names_are_documented():
    for name in peft_child.__all__:
        documentation = getattr(peft_child, name).__doc__ or ""
        assert documentation
        assert not documentation.startswith(f"{name}("), f"{name} has only what NamedTuple or dataclass wrote"


DOCS = ROOT.parent / "docs"


def test_the_picture_and_the_page_show_the_modules_that_there_are():
    shown = (DOCS / "architecture.svg").read_text()
    page = (DOCS / "architecture.md").read_text() + (ROOT.parent / "CONTRIBUTING.md").read_text()
    assert all(
        f">{source.stem}<" in shown for source in SOURCES if source.parent != ROOT and source.stem != "__init__"
    )
    code = "\n".join(source.read_text() for source in SOURCES)
    for name in re.findall(r"`([\w./]+)`", page):
        assert (
            any((ROOT.parent / folder / name).exists() for folder in ("", "peft_child")) or name.split(".")[-1] in code
        )


def test_the_oldest_versions_that_are_promised_are_those_that_are_tested():
    settings = (ROOT.parent / "pyproject.toml").read_text()
    promised = re.findall(r'^  "(\w+)>=([\d.]+)",$', settings, re.MULTILINE)
    extras = re.search(r"^plots = .*\nexamples = .*$", settings, re.MULTILINE)[0]
    promised += re.findall(r'"([\w-]+)>=([\d.]+)"', extras)
    tested = re.findall(r"^([\w-]+)==(.+)$", (ROOT.parent / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert {name: Version(version) for name, version in promised} == {name: Version(it) for name, it in tested}


def test_what_the_oldest_python_cannot_have_is_promised_from_the_tested_version_on():
    settings = (ROOT.parent / "pyproject.toml").read_text()
    promised = dict(re.findall(r'"([\w-]+)>=([\d.]+); python_version', settings))
    tested = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT.parent / "constraints.txt").read_text(), re.MULTILINE))
    assert promised
    assert all(Version(version).release[:2] == Version(tested[name]).release[:2] for name, version in promised.items())
