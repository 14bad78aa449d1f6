"""Pure values: images and their identity, chains, plans, outcomes, backing names."""
