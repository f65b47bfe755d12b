"""Text from a Mixture, token by token: caches, sampling.

Imports mix and below.
"""
