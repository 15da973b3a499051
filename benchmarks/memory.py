"""Bytes that Child-Tuning takes by part, as docs/scale.md plans them and as they are, for three sizes of a Llama.

    python -m benchmarks.memory

Counts the bytes of the tensors themselves, so it does not depend on the machine. Each size is built from a
configuration, given a random child network (whose index blocks are the largest there are), scored on one example and
trained for one step of AdamW.
"""

import argparse

import torch
from peft import get_peft_model

from benchmarks.shapes import build, llama, targeted
from peft_child import ChildTuningConfig, estimate_fisher
from peft_child.layers.layer import child_tuning_layers


SIZES = {"10M": llama(10, 288), "50M": llama(16, 512), "200M": llama(16, 1024)}


def planned(weights, targeted, density, itemsize):
    """Bytes by part, from the numbers of all and of targeted weights; docs/scale.md explains each."""
    chosen = density * targeted
    return {
        "weights": itemsize * weights,
        "scores": 4 * targeted,
        "index on disk": 0.6 * chosen,
        "index in memory": 4 * chosen,
        "deltas": 4 * chosen,
        "gradients": 4 * chosen,
        "AdamW": 8 * chosen,
    }


def measured(base, density):
    """Bytes by part, of tensors that exist."""
    weights = size(base.parameters())
    model = get_peft_model(base, ChildTuningConfig(variant="random", density=density, target_modules="all-linear"))
    batch = {"input_ids": torch.arange(64).view(1, -1), "labels": torch.arange(64).view(1, -1)}
    scores = size(estimate_fisher(model, [batch], progress_bar=False).values())
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(deltas)
    model(**batch).loss.backward()
    optimizer.step()
    layers = child_tuning_layers(model).values()
    return {
        "weights": weights,
        "scores": scores,
        "index on disk": size(block for layer in layers for block in layer.child_index["default"].values()),
        "index in memory": size(
            layer.child_index.known("default", key) for layer in layers for key in layer.child_index["default"]
        ),
        "deltas": size(deltas),
        "gradients": size(delta.grad for delta in deltas),
        "AdamW": size(value for state in optimizer.state.values() for value in state.values() if value.dim()),
    }


def size(tensors):
    """Bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    """Print the plan beside what was counted."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--density", type=float, default=0.1, help="share of the child network")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SIZES.items():
        base = build(shape).to(getattr(torch, args.dtype))
        weights = sum(parameter.numel() for parameter in base.parameters())
        scored = sum(parameter.numel() for _, parameter in targeted(base))
        plan = planned(weights, scored, args.density, base.dtype.itemsize)
        found = measured(base, args.density)
        print(f"\n{name}: {weights:,} weights, {scored:,} targeted, density {args.density}")
        print(f"{'':18}{'planned MB':>12}{'counted MB':>12}{'ratio':>8}")
        for part, expected in plan.items():
            print(f"{part:18}{expected / 1e6:12.2f}{found[part] / 1e6:12.2f}{found[part] / expected:8.3f}")


if __name__ == "__main__":
    main()
