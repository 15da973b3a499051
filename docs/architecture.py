"""Draws docs/architecture.svg from the source: the packages, the modules in them, and what stands on what.

Run it with `python docs/architecture.py` after a module has come or gone.
"""

import ast
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch


ROOT = Path(__file__).parents[1] / "peft_child"
PICTURE = Path(__file__).with_suffix(".svg")
ROOMS = {  # from the top; each imports only what is below it
    "cli": "the command peft-child",
    "integrations": "PEFT's registry, transformers' Trainer, the Hub",
    "selection": "the Fisher pass, and which entries are chosen",
    "tuner": "the PEFT method: configuration, targets, state dicts",
    "layers": "one targeted module: its tensors, how it runs and is merged",
    "files": "adapters and checkpoints without a model",
    "card": "the model card, heat maps, and pages of HTML",
    "tensors": "child networks of single tensors: pure torch",
}
COLUMNS = 6
WIDTH, HEIGHT = 1.55, 0.42


def modules_of(room: str) -> list[str]:
    """Names of the modules in a package."""
    return sorted(file.stem for file in (ROOT / room).glob("*.py") if file.stem != "__init__")


def imports_of(room: str) -> list[str]:
    """The packages that the modules of a package import, in the order of `ROOMS`."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / room).glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {(node.module or "").split(".")[1] for node in nodes if (node.module or "").startswith("peft_child.")}
    return [other for other in ROOMS if other in found - {room}]


def draw() -> None:
    """Write the picture."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "peft-child", "font.size": 9}
    figure, axes = plt.subplots(figsize=(10.5, 8.6))
    top = 0.0
    for room, purpose in ROOMS.items():
        modules = modules_of(room)
        depth = 0.62 + -(-len(modules) // COLUMNS) * HEIGHT
        box = FancyBboxPatch((0, top - depth), COLUMNS * WIDTH, depth - 0.12, boxstyle="round,pad=0.02", fc="#f2f5fa")
        axes.add_patch(box)
        axes.text(0.1, top - 0.32, f"{room}/", weight="bold")
        axes.text(1.45, top - 0.32, purpose)
        below = ", ".join(imports_of(room))
        axes.text(COLUMNS * WIDTH - 0.1, top - 0.32, f"imports {below}" if below else "", ha="right", color="#666666")
        for index, name in enumerate(modules):
            row, column = divmod(index, COLUMNS)
            axes.text(0.1 + column * WIDTH, top - 0.72 - row * HEIGHT, name, family="monospace", size=8)
        top -= depth
    axes.set(xlim=(-0.1, COLUMNS * WIDTH + 0.1), ylim=(top - 0.1, 0.1))
    axes.axis("off")
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw()
