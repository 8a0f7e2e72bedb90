"""Where the model runs, and how requests reach it."""
