"""torchao: int8 and int4 layers, the orders of their codes, its checkpoints, and tensors of the library."""
