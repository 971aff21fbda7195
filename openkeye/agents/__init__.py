"""Agents: a model that acts through tools, and the worlds it acts in. A model is only a Protocol here."""
