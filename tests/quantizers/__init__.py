"""Tests of `quantizers`."""
