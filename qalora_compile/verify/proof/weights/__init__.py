"""Linear layers and lookups as exact matrices, whatever their encoding."""
