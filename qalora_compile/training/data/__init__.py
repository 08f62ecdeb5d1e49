"""Training data: files, row forms, tokens and batches."""
