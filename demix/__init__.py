"""demix: language models made of domain experts, in JAX and Flax."""

__version__ = '0.1.0'
