"""Grids of runs: a driver that can be stopped, results by command, the search for learning rates, tables and figures.

`runs` knows what a run is and keeps the results, `pool` executes runs in processes, `search` says which learning rates
are tried, and `driver` plans, runs and writes experiments.
"""
