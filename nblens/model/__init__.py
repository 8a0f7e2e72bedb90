"""What is known about one model, on one process."""
