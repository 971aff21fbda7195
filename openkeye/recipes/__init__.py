"""Floor 5: runs. Each module's functions return complete typed settings for `openkeye train`."""
