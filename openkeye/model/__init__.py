"""Floor 3: the Keye-VL-2.0 network, one definition for training and answering."""
