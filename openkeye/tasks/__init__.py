"""Tasks: questions and how an answer is scored. One class serves reinforcement learning and evaluation."""
