"""The reported cases, one named test each."""
