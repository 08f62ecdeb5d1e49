"""Checkpoints that other libraries read: one file a format, named as its reader is."""
