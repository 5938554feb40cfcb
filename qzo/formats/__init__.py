"""The formats of quantized layers, a package each, and what all of them share."""
