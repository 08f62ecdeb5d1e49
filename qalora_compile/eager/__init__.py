"""The module-level back-end: the same plan applied to the user's own modules instead of the graph.

`api.adapt_module_` combines capture, passes and this package, which imports the IR and, for its
cross-check, `verify`.
"""
