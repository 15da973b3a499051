"""Is it worth it on a language model? What methods learn, what they forget and what they cost, with `examples/sft.py`.

python -m benchmarks.sft sft --processes 2
"""
