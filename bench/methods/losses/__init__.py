"""Losses that never hold all logits: in chunks of tokens, in tiles of tokens and words, or fused with the head."""
