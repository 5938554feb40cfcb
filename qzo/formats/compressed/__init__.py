"""compressed-tensors: what its settings say of each layer, the layer, its checkpoints, and modules of the library."""
