"""Floor 4: answering."""
