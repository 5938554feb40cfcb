"""Rows that others published, as what can be predicted: one file a source, which knows how that source ran a step."""
