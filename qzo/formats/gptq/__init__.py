"""GPTQ: the layer, the order of its codes, and modules of the library gptqmodel."""
