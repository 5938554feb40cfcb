"""How well each method learns."""
