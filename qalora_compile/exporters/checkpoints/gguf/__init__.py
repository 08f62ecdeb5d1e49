"""GGUF files: tensors, metadata and the tokenizer."""
