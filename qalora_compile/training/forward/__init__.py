"""The forward pass in training: memory, precision and loss."""
