"""Measures a steering vector on a session: propensities, side effects, controls, and the choice of a block."""
