"""Tensors of a checkpoint that a model has no place for and may do without."""

from __future__ import annotations

import re
from typing import Any

from qzo.files.folder import Header

NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
ATTENTION = r"(?:^|\.)(?:attn|attention|self_attention|self_attn)\."
OLD_BUFFERS = (  # that configurations imply, and their number of dimensions where a weight may have the name
    (re.compile(ATTENTION + r"bias$"), (4,)),  # a causal mask
    (re.compile(ATTENTION + r"masked_bias$"), (0, 1)),
    (re.compile(r"(?:^|\.)(?:rotary_emb|rotary|rope)\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)$"), None),
    (re.compile(r"(?:^|\.)position_ids$"), None),
)
OF_NEXT_TOKENS = (".eh_proj.", ".enorm.", ".hnorm.")  # in layers that predict the tokens after the next one (MTP)


class Leftovers:
    """What may be left over of a model's files."""

    def __init__(self, model: Any, headers: dict[str, Header]) -> None:
        """Note what the model's classes say that they ignore, and which layers are for tokens after the next."""
        patterns: set[str] = set()
        for module in model.modules():
            patterns |= set(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
        self.ignored = [re.compile(pattern) for pattern in sorted(patterns)]
        marked = {layer_number(name) for name in headers if any(mark in name for mark in OF_NEXT_TOKENS)}
        count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        self.ahead = {number for number in marked if isinstance(count, int) and number is not None and number >= count}

    def has(self, name: str, header: Header) -> bool:
        """Whether a tensor without a place is one of them."""
        if layer_number(name) in self.ahead or any(pattern.search(name) for pattern in self.ignored):
            return True
        found = next((dims for pattern, dims in OLD_BUFFERS if pattern.search(name)), ())
        return found is None or len(header.shape) in found


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor is of; None where it is of none."""
    found = NUMBERED.search(name)
    return None if found is None else int(found[1])
