"""What fits into a memory: the largest batch, the longest sequence, and the change that helps most cheaply."""
