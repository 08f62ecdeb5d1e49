"""Codes as bytes: a dense stream of bits, and the layouts that kernels take."""
