"""Pictures of numbers, and what compiled programs say about themselves."""
