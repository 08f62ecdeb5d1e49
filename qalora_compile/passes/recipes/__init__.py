"""Procedures that combine several passes, or choose the options of a pass."""
