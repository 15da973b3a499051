"""Does Child-Tuning work? Grids of fine-tuning runs, and the tables and figures made of them.

    python -m benchmarks.glue main --processes 2

`runs` knows what a run is and keeps the results, `pool` executes runs in processes, `grid` turns tasks, methods, rates
and seeds into runs, and the experiments (`main`, `ablations`, ...) say which, and write a table and a figure of each.
"""
