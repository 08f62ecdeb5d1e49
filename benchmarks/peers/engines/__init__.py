"""One module for each runtime: its `Engine` loads a model and reads tokens, see `child.Engine`."""
