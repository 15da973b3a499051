"""One targeted module: the tensors of its adapters, and how it runs and is merged.

Start with `layer`, which wraps the module.
"""
