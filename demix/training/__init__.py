"""The one training loop: a run, what it starts from, its schedule, its metrics.

Imports eval and all below.
"""
