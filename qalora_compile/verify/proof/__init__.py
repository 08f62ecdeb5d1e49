"""Proof that two graphs are equal: structure, weights and terms; certificates."""
