"""Checkpoints: written in the background, trusted only when verified.

Imports runtime only; needs no model.
"""
