"""Kernels in Triton for NVIDIA GPUs: weights from packed codes, products with them, both sides of a step at once."""
