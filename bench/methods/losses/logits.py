"""What a model does to its logits, and which labels count."""

from __future__ import annotations

import numpy as np

IGNORED = -100  # a label that is no token of the loss


def bent(logits: np.ndarray, scale: float, softcap: float | None) -> np.ndarray:
    """Scaled as Cohere's are, then bent as Gemma's are."""
    logits = logits * scale
    return logits if softcap is None else softcap * np.tanh(logits / softcap)
