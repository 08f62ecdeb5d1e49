"""Proofs about ONNX files that other programs wrote."""
