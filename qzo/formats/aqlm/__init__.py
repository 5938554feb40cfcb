"""AQLM: the layer on codes and codebooks, and modules of the library aqlm."""
