"""The loss of a language model, with logits only where labels are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError

IGNORED = -100  # transformers' label for "no label here"


def label_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    keep: int | None = None,
) -> Tensor:
    """Mean cross entropy of the labelled tokens, each predicted from the tokens before it.

    Equals `model(input_ids, labels=labels).loss`, but the head computes logits for the last `keep` + 1 positions
    only: [B, keep + 1, V] in place of [B, T, V]. The cross entropy is computed in fp32.

    Args:
        model: a transformers causal language model.
        input_ids: [B, T].
        labels: [B, T]; -100 where there is no label. Column 0 has nothing to be predicted from and never counts.
        attention_mask: [B, T], or None.
        keep: number of last columns that hold every label; None looks for it, which reads `labels` once. Needed on
            `meta`. A label further left is not seen.

    Returns:
        Scalar fp32 tensor.

    Raises:
        QzoError: shapes that do not fit, or no label at all.
    """
    if input_ids.dim() != 2 or labels.shape != input_ids.shape:
        raise QzoError(
            f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; both must be [B, T]"
        )
    length = input_ids.shape[1]
    if keep is None:
        columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()
        keep = length - 1 - int(columns[0]) if len(columns) else 0
    if not 1 <= keep < length:
        raise QzoError(f"keep={keep} label columns of {length}; need at least 1 label, after the first column")
    with head_in_one_product(model):
        output = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep + 1, use_cache=False)
    logits = output.logits[:, -keep - 1 : -1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -keep:].flatten(), ignore_index=IGNORED)


@contextmanager
def head_in_one_product(model: nn.Module) -> Iterator[None]:
    """Within, the head of a transformers model gets the columns it computes logits for as one contiguous tensor.

    The model cuts them out of [B, T, H]. PyTorch multiplies what is cut out sequence by sequence with a frozen weight,
    which reads the largest weight there is B times in place of once (16 sequences of SmolLM2-135M on one core: 0.20 s
    in place of 0.03 s). Logits may differ in their last bits.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
