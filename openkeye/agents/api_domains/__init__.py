"""Simulated services with a memory: domains as data, one simulator, goals with reference solutions, rewards."""
