"""Directions added to a model's activations: how they are found, kept and applied."""
