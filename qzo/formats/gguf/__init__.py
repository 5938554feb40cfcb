"""GGUF: block types, the header, layers on packed blocks, and the files themselves."""
