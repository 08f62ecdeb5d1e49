"""Comparison by execution: inputs, a float64 reference, bounds on rounding, verdicts."""
