"""The methods that are compared, with the learning rates to begin the search with."""

from __future__ import annotations

from benchmarks.grid.search import Method


DENSE_RATES = (3e-5, 1e-4, 3e-4)
SPARSE_RATES = (1e-4, 3e-4, 1e-3)
FISHER_EXAMPLES = 256  # a fifth of the time that training takes


def task_driven(density: float) -> Method:
    """Child-Tuning_D."""
    return Method(f"CT_D {density:g}", (*_child(density), *_examples(FISHER_EXAMPLES)), SPARSE_RATES)


def chosen_by(count: int, density: float) -> Method:
    """Child-Tuning_D with a child network that other numbers of examples choose, at the usual learning rate."""
    return Method(f"{count} examples", (*_child(density), *_examples(count)), like=task_driven(density))


def task_free(density: float) -> Method:
    """Child-Tuning_F."""
    return Method(f"CT_F {density:g}", ("--method", "task_free", "--density", f"{density:g}"), DENSE_RATES)


def random(density: float) -> Method:
    """A fixed random child network."""
    return Method(f"Random {density:g}", ("--method", "random", "--density", f"{density:g}"), SPARSE_RATES)


def control(child: str, density: float) -> Method:
    """Child-Tuning_D with another choice."""
    names = {"lowest": "Lowest Fisher", "authors": "Authors' Fisher", "pruned": "Pruned to the child"}
    options = (*_child(density), *_examples(FISHER_EXAMPLES), "--child", child)
    return Method(names[child], options, SPARSE_RATES, "variants")


def by_channels(method: Method) -> Method:
    """The same method with a child network of whole input channels."""
    return method._replace(
        name=f"{method.name}, channels", options=(*method.options, "--granularity", "input_channel")
    )


FULL = Method("Full", ("--method", "full"), DENSE_RATES)
UNTRAINED = Method("Untrained", ("--method", "full", "--untrained"), script="variants", like=FULL)
LORA = Method("LoRA r=8", ("--method", "lora"), (3e-4, 1e-3, 3e-3))
SHIRA = Method("SHiRA 0.1", ("--method", "shira", "--density", "0.1"), SPARSE_RATES)


def elsewhere(method: Method) -> Method:
    """The same method, trained at the same learning rate, to be judged on other tasks as well."""
    return method._replace(script="variants", like=method)


def _child(density: float) -> tuple[str, ...]:
    return ("--method", "child", "--density", f"{density:g}")


def _examples(count: int) -> tuple[str, ...]:
    return ("--num-fisher-examples", str(count))
