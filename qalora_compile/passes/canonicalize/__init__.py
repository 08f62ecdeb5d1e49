"""Passes that give a captured graph one form before linear layers are looked for."""
