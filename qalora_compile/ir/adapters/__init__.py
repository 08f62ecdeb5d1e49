"""The adapters of a program as its graph holds them: one class for each kind, one interface."""
