"""Readers of the formats in which people keep samples: `open_source` finds them by name."""
