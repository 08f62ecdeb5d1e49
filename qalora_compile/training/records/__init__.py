"""What a training run writes, and how it is taken up again."""
