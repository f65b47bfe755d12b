"""Experts that come and go: adding one to a DEMix LM, removing one, and what is known of each."""
