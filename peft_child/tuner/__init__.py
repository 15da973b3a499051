"""The PEFT method: configuration, targets, and the state dicts of loaders.

Start with `model`, which PEFT calls.
"""
