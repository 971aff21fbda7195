"""The first weights of openkeye-tiny from nothing: slot batches, cell losses and attention hints (`recipes/tiny.py`)."""
