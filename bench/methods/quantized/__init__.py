"""Weights as bitsandbytes keeps them, on tensors with and without data."""
