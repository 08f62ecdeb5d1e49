"""Readers of quantized checkpoints, one format per file; codes are kept unchanged."""
