"""The evidence after a crash: which image is right, and what puts the rest right."""
