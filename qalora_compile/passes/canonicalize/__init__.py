"""Passes that bring a captured graph into canonical form before the search for linear maps."""
