"""CUDA: what its kernels allocate, its autocast, and which attention kernel runs."""
