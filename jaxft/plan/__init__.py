"""Plans: memory and speed of a run on hardware that need not exist, and better settings."""
