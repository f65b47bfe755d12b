"""One thin file per verb; each has SUMMARY, and run(argv) that returns an exit code."""
