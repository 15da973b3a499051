"""The PEFT method: configuration, targets, layers, and the state dicts of loaders.

Start with `model`, which PEFT calls, and `layer`, which wraps a targeted module.
"""
