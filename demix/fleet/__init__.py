"""Many runs: sweeps over a config's settings.

Imports verbs and below.
"""
