"""Floor 2: every operation of the model; `reference.py` defines each one in plain PyTorch."""
