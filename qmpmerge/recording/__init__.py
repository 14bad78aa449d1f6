"""What was said and done, as it was said and done: written down for whoever has to find out what went wrong."""
