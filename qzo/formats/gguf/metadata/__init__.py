"""What the metadata of a GGUF say about its model: keys read as llama.cpp reads them, and the config they make."""
