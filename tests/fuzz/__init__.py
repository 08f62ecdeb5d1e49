"""Mutation fuzzing of every input format: `make fuzz`, or `python -m tests.fuzz --help`."""
