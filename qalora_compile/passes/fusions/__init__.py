"""Passes that replace several nodes by one operator with the same meaning."""
