"""What was about to be done, written down before it is done."""
