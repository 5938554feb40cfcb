"""Optimizers as the Trainer of transformers makes them, and what each keeps of what is trained."""
