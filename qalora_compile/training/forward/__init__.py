"""The forward pass in training: memory, precision and the loss."""
