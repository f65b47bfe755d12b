"""Domains that nobody labelled: clusterers, how they are fitted, stores by cluster."""
