"""One file an experiment; each has `get_config(arg) -> ml_collections.ConfigDict`."""
