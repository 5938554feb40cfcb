"""bitsandbytes: its 4-bit and 8-bit layers, its checkpoints, and modules of the library."""
