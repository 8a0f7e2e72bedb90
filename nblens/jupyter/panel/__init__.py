"""The steering panel: sliders, and text that follows them while it is written."""
