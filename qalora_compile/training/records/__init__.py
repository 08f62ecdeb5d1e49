"""The files that a training run writes, and how it is resumed from them."""
