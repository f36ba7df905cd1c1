"""Everything that a GPU is needed for, in two calls of a few minutes."""
