"""Tests on real models."""
