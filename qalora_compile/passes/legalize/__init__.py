"""Passes that lower a folded program to operators that a target can run."""
