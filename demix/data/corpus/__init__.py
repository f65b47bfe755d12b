"""A corpus into a token store: documents in files, anonymising, the data card."""
