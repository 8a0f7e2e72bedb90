"""nblens beside other libraries that read lenses and steer, each in an environment of its own. See `__main__`."""
