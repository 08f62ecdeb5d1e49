"""Training data: files, forms of a row, tokens, batches."""
