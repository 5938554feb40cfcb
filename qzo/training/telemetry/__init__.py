"""What a run tells of itself: a bar or lines, its sealed metrics.jsonl, and what its learning rate can reach."""
