"""Symbolic comparison: tensors as functions from indices to real-valued expressions."""
