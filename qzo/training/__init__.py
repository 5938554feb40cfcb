"""A training run: its settings, task, loop and folder, its checkpoints, and its export."""
