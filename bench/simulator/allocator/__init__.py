"""PyTorch's CUDA caching allocator: its segments, its settings, and events replayed through it."""
