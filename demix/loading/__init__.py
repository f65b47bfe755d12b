"""Model references, and what they lead to: models, forests, LMs with a tokenizer.

Imports checkpoints, forest, mix, generation and below.
"""
