"""The evidence after a crash: which image is right."""
