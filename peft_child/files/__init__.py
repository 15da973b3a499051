"""Adapters and checkpoints in files, without a model: read, write, extract, combine and merge.

Start with `adapter_tensors`, which says what a file holds, and `adapter_folder`, which reads and writes one.
"""
