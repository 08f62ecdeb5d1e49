"""The module-level back-end: the same plan applied to the user's own modules instead of the graph.

`api.adapt_module_` joins capture, passes and this room. Depends on the IR, and on `verify` for the
numbers of its cross-check.
"""
