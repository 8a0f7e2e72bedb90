"""Reading a run: trajectories, and (later) translators in front of the readout."""
