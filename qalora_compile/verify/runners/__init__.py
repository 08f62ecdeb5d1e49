"""Everything that can run on the same inputs: programs, ONNX files, other libraries."""
