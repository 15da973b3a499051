"""`examples/sft.py` as a module. It is apart from the other examples, since it needs TRL."""

from benchmarks.grid.scripts import load


sft = load("sft")
