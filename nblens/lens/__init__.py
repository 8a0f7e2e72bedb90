"""Reading a run: trajectories, and translators in front of the readout."""
