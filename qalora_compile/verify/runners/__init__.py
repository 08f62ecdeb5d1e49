"""Whatever can be run on the same inputs: programs, ONNX files, other libraries."""
