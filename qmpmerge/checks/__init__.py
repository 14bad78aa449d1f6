"""May we? Everything is asked before anything is sent."""
