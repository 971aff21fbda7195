"""Rewards: named, bounded in time, functions of an example and an answer alone. One file for each family."""
