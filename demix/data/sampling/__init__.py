"""Which sequences make a batch: shares, schedules, importance."""
