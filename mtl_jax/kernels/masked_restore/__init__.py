"""One task's parameters out of a shared delta and a packed mask."""
