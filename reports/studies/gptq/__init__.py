"""GPTQ beside round-to-nearest, layer by layer."""
