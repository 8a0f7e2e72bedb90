"""Will a model fit, and what goes where: told from its configuration, before a weight is read."""
