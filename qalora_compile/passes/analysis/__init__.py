"""Analyses, which change nothing: where weights are used, and which sites options name."""
