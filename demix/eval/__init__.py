"""Numbers: perplexity and bits per byte per domain, and the table and file they end in."""
