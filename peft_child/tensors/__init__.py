"""Tensors and bytes: child networks of single tensors, without modules, files or PEFT.

Start with `delta` (a child network of one tensor, and the rounding rule), `compose` (how a module computes with it),
`gradient_mask` (CT_F), `topk` (the largest scores) and `codec` (indices as bytes).
"""
