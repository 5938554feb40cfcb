"""Every quantization format on one model."""
