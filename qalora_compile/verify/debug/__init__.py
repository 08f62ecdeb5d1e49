"""Locates a difference: bisection over passes, a script that reproduces it, an HTML page."""
