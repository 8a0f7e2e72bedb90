"""What any grid of blocks × tokens shows, as plain arrays, and that as a page."""
