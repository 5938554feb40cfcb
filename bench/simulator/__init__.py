"""What a device would have allocated for a step that ran on tensors without data."""
