"""Make a model from another one: warm start, prune, upcycle, weights alone."""
