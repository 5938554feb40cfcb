"""LitGPT's own model, its adapters and its loss in chunks, on tensors without data."""
