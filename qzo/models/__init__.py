"""A transformers model: its folder and settings, its layers, how it is put together, and its loss."""
