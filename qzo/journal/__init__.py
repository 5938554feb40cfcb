"""A line on disk for each step, enough to rebuild the tuned model to the bit."""
