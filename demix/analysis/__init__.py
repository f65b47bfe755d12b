"""Pictures of numbers: what a model, a run or a forest is made of, and what it takes."""
