"""Checkpoints that other libraries read: one module per format, named like its reader."""
