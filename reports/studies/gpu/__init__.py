"""What was measured on a GPU, as a page."""
