"""Requests served over one model in one process: the runner, and what is done with it."""
