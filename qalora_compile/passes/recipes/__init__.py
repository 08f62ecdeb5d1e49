"""Procedures made of several passes, or that decide what a pass is to do."""
