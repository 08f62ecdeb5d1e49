"""Tests of qalora-compile; the folders mirror the package."""
