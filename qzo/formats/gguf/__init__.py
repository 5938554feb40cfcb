"""GGUF: block types, the header, where its tensors go, layers on packed blocks, and the files themselves."""
