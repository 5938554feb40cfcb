"""What is asked for: model, method, quantization, GPU, weights and text."""
