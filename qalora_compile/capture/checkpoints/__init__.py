"""Checkpoints that are quantized already, one format a file: their codes are kept as they are."""
