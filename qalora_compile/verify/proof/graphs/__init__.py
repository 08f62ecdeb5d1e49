"""Programs and ONNX files in one graph representation."""
