"""Passes that rewrite a folded program to what a target can run."""
