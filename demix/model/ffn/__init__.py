"""Feed-forward layers: the dense one, and the DEMix layer's domain experts."""
