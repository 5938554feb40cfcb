"""The loss of a language model, with logits only where labels are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qzo.errors import QzoError
from qzo.models.positions import position_options

IGNORED = -100  # transformers' label for "no label here"


def label_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    keep: int | None = None,
) -> Tensor:
    """Mean cross entropy of the labelled tokens, each predicted from the tokens before it.

    Equals `model(input_ids, labels=labels).loss`, but the head computes logits for the `keep` positions before the
    last one only: [B, keep, V] in place of [B, T, V], see `last_columns_only`. The cross entropy is computed in fp32.

    Args:
        model: a transformers causal language model.
        input_ids: [B, T].
        labels: [B, T]; -100 where there is no label. Column 0 has nothing to be predicted from and never counts.
        attention_mask: [B, T], 0 on padding, on whichever side; or None. Positions count the tokens of a row alone, so
            that the loss is that of the rows without padding.
        keep: number of last columns that hold every label; None looks for it, which reads `labels` once. Needed on
            `meta`. A label further left is not seen.

    Returns:
        Scalar fp32 tensor.

    Raises:
        QzoError: shapes that do not fit, no label at all, or padding that the model cannot leave out, see
            `qzo.models.positions.position_options`.
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
        raise QzoError(f"keep={keep} label columns of {length}; give at least 1 label, after the first column")
    options: dict[str, Any] = position_options(model, attention_mask, length)
    with last_columns_only(model, keep + 1, unread=1):
        output = model(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep + 1, use_cache=False, **options
        )
    logits = output.logits
    if logits.shape[1] > keep:  # the head has computed those of the last column too
        logits = logits[:, -keep - 1 : -1]
    logits = logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -keep:].flatten(), ignore_index=IGNORED)


@contextmanager
def last_columns_only(model: nn.Module, keep: int, unread: int = 0) -> Iterator[None]:
    """Within, a transformers decoder computes for the last `keep` columns alone what no other column needs.

    Of these the head, where it is handed as many, leaves out the last `unread`, whose logits nobody reads.

    The logits of a column depend on other columns through attention only. So the MLP of the last decoder layer gets
    [B, keep, H] of its [B, T, H], and what it would add to the other columns, which the head does not read, is 0. The
    head, to which the model hands the columns it was told of (`logits_to_keep`), gets them as one contiguous tensor:
    PyTorch multiplies what is cut out of [B, T, H] sequence by sequence with a frozen weight, which reads the largest
    weight there is B times in place of once (16 sequences of SmolLM2-135M on one core: 0.20 s in place of 0.03 s), and
    on CPUs with instructions for bf16 copies it (57 MB there).
    Logits may differ in their last bits. Models without such parts are left as they are.
    """
    head, mlp = _part(model, "get_output_embeddings"), getattr(_last_layer(model), "mlp", None)
    handles = []
    if head is not None:
        handles.append(head.register_forward_pre_hook(partial(_read_only, keep, unread)))
    if isinstance(mlp, nn.Module):
        handles += _narrowed(mlp, keep)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _narrowed(module: nn.Module, keep: int) -> list[RemovableHandle]:
    """Hooks that let a module [B, T, H] -> [B, T, H] see the last `keep` columns, and fill the others up with 0."""
    left_out: list[int] = []

    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        columns = inputs[0].shape[1] if inputs and inputs[0].dim() == 3 else 0
        if any(isinstance(item, Tensor) and item.dim() > 2 for item in inputs[1:]):  # columns of its own (Zaya)
            columns = 0
        left_out.append(max(0, columns - keep))
        return (_one_block(inputs[0][:, -keep:]), *inputs[1:]) if left_out[-1] else inputs

    def widen(_: nn.Module, __: Any, output: Any) -> Any:
        before = (0, 0, left_out.pop(), 0)
        if isinstance(output, Tensor):
            return nn.functional.pad(output, before)
        return (nn.functional.pad(output[0], before), *output[1:])  # mixtures of experts, which tell their routing too

    return [module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)]


def _read_only(keep: int, unread: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a head is given, as one block and without the columns whose logits are not read.

    A single row that would be left stays with another: products of a matrix and a vector are other code.
    """
    hidden = inputs[0]
    if hidden.dim() == 3 and hidden.shape[1] == keep and hidden.shape[0] * (keep - unread) > 1:
        hidden = hidden[:, : keep - unread]
    return (_one_block(hidden), *inputs[1:])


def _one_block(x: Tensor) -> Tensor:
    """`x` with the strides of a contiguous tensor; `contiguous()` leaves those of a batch of 1 as they were cut.

    `reshape` alone leaves a single column of each sequence where it was.
    """
    return x.reshape(-1, x.shape[-1]).contiguous().view(x.shape)


def _last_layer(model: nn.Module) -> nn.Module | None:
    layers = getattr(_part(model, "get_decoder"), "layers", None)
    return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None


def _part(model: nn.Module, getter: str) -> Any:
    """What a transformers model names as one of its parts, or None."""
    find: Any = getattr(model, getter, None)
    return None if find is None else find()
