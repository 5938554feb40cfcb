"""Every architecture of transformers under every method."""
