"""What is done to a running guest, and undone if we die."""
