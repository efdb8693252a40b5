"""A setting for a model, from what its own dense answers look at."""
