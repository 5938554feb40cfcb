"""Arithmetic on tensors alone: weights to low-bit codes, codes back to weights, and products with them."""
