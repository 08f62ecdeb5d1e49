"""Passes that fuse several nodes into one operator with the same meaning."""
