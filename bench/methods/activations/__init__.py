"""Which activations wait for backward, and where: recomputed, on the host, or as a compiler would keep them."""
