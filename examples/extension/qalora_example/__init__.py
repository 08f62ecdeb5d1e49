"""An extension of qalora-compile: one pass, one quantizer, one target, one reader.

Nothing is imported here: the entry points of pyproject.toml name what is registered.
"""
