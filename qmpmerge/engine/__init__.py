"""One operation on a chain, and its states."""
