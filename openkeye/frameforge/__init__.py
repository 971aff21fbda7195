"""Floor 2: synthetic videos whose truth is known because we drew it."""
