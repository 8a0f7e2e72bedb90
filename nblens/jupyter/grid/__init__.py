"""The grid: what every block would have said at every token, as a live widget."""
