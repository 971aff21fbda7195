"""Floor 1: what every other folder may use. Imports nothing of ours."""
