"""Plans: memory, speed and better settings of a run, without its hardware."""
