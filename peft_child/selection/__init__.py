"""Which entries form the child network: the Fisher pass and the choice.

Start with `select`. `fisher_pass` walks through the data, `squares` defines the score, and the other modules make it
fast.
"""
