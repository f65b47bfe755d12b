"""Text that lies on the machine, as a corpus of domains."""
