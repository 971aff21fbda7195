"""Floor 3: from videos and questions to training batches."""
