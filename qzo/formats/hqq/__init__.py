"""HQQ: the layer, the order of its codes, its checkpoints, and modules of the library."""
