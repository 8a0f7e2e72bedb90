"""Measures a steering vector: propensities, side effects, controls, and the choice of a block."""
