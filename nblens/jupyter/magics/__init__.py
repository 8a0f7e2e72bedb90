"""The magics: parsing, then one call of the Python API."""
