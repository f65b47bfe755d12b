"""The decoder LM: its config, modules, leaves, loss and how it lies on a mesh.

Knows no data, no files and no training.
"""
