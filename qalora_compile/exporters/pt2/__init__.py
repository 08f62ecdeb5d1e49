"""`.pt2` files: a legalized program exported by torch, and compiled by AOTInductor on request.

The quantized layers are calls of torch's own kernel for 4-bit weights, whose zeros are real
numbers, so that a folded program needs neither a correction nor an operator library there.
"""
