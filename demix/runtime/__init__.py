"""What every run stands on: workdirs, digests, progress, processes, rates.

Imports errors, names and settings only.
"""
