"""What a QZO step costs on a CPU."""
