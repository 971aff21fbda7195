"""Reinforcement learning: from a checkpoint to a better one, by rollouts, rewards and policy updates."""
