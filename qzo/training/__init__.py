"""A training run: its settings, task, loop and folder, its export, and the Trainer of transformers."""
