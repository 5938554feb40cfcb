"""What of a model is trained: scales, sets of tensors, adapters, adopted models, and the proof that they count."""
