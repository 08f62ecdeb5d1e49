"""Proves that two graphs are equal by their structure, weights and terms; certificates."""
