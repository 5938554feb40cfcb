"""A transformers model: how it is put together from its files, its layers, and its loss."""
