"""Time and memory of Child-Tuning beside other methods; `make benchmark` runs `benchmarks.run`."""
