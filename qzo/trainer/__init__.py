"""The Trainer of transformers with steps of QZO: what of its arguments holds, its rows, its checkpoints on disk."""
