"""Programs and ONNX files as one kind of graph."""
