"""Liger's kernels in the place of norms, feed-forward layers and rotary embeddings: what they make and keep."""
