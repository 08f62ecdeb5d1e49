"""Linear layers and lookups as exact matrices, for every encoding."""
