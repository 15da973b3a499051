"""`examples/glue.py` and `examples/quickstart.py` as modules."""

from benchmarks.grid.scripts import load


glue = load("glue")
quickstart = load("quickstart")
