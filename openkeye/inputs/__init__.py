"""Floor 2: from files and messages to `ModelInput`."""
