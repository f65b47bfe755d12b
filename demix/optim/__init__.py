"""The training state, the optimizer and the step, for one run or several.

Imports model and runtime.
"""
