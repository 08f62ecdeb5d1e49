"""Comparison by running: inputs, a float64 reference, bounds on rounding, verdicts."""
