"""Attention, norms and initializers, in the forms that are fast per backend."""
