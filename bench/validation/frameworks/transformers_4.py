"""Losses of causal language models in transformers 4, which hold more copies of the logits than today's.

Until 4.45 the model turned its logits into fp32 itself and dropped the 16-bit ones; from 4.46 to 4.49 the loss did so
while the model still held them. Both cut the last position off by a copy (4.45: modeling_mistral.py, forward; 4.46:
loss/loss_utils.py, ForCausalLMLoss). Since 4.50 labels are padded instead of logits cut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

IGNORED = -100
Loss = Callable[..., Tensor]
LOSS_OF_ITS_OWN, LABELS_PADDED = (4, 46), (4, 50)


def base_of(model: Any) -> Any:
    """The model inside of PEFT's, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_loss_of(version: str, loss: Loss | None = None) -> Callable[[nn.Module], None]:
    """The change that makes a model compute its loss as this version of transformers did, by `loss` where given."""
    release = tuple(int(part) for part in version.split(".")[:2])

    def change(model: nn.Module) -> None:
        inner = base_of(model)
        if release < LOSS_OF_ITS_OWN and loss is not sixteen_bit_loss:
            inner.forward = partial(_forward_with_loss, inner, loss or cut_logits_loss)
        elif release < LABELS_PADDED or loss is not None:
            inner.loss_function = loss or cut_logits_loss

    return change


def _forward_with_loss(model: Any, loss: Loss, input_ids: Tensor, labels: Tensor, **options: Any) -> Any:
    """Logits in 16 bits, scaled where the model scales them, and in fp32, each in the place of the one before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    hidden = model.model(input_ids=input_ids, attention_mask=options.get("attention_mask"))[0]
    logits = model.lm_head(hidden)
    scaling = getattr(model.config, "logits_scaling", None)
    if scaling is not None:
        logits = logits / scaling
    logits = logits.float()
    return CausalLMOutputWithPast(loss=loss(logits, labels, model.config.vocab_size), logits=logits)


def repeat_keys(model: nn.Module) -> None:
    """Keys and values as often as query heads share them, before FlashAttention: so Mistral's attention did until 4.47
    (modeling_mistral.py, MistralFlashAttention2), and Llama's did not.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.forward = partial(_repeating, module.forward)


def _repeating(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from transformers.integrations import sdpa_attention

    original = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    try:
        return forward(*args, **kwargs)
    finally:
        sdpa_attention.use_gqa_in_sdpa = original


def keep_presents(model: nn.Module) -> None:
    """GPTBigCode does not switch its cache off when it checkpoints: each layer's keys and values, a view of all that
    its `c_attn` gave, live as long as the model's output (4.48: modeling_gpt_bigcode.py, `presents`).
    """
    inner = base_of(model)
    forward = inner.forward
    products = [module for name, module in inner.named_modules() if name.endswith(".c_attn")]

    def run(*args: Any, **kwargs: Any) -> Any:
        presents: list[Tensor] = []
        hooks = [module.register_forward_hook(lambda _, args, out: presents.append(out)) for module in products]
        try:
            output = forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        output["past_key_values"] = tuple(presents)
        return output

    inner.forward = run


def cut_logits_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    """Cross entropy of fp32 logits [B, T, V] whose last position is cut off by a copy."""
    logits = logits.float()
    shifted, targets = shift(logits, labels, vocab_size)
    return F.cross_entropy(shifted, targets, ignore_index=IGNORED)


def sixteen_bit_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Of models that leave their logits in 16 bits; autocast turns them into fp32 for the cross entropy alone."""
    shifted, targets = shift(logits, labels, vocab_size)
    return F.cross_entropy(shifted, targets, ignore_index=IGNORED)


class CopiedGradient(Function):
    """The same tensor, whose gradient is copied on the way back, before that of the whole logits is made of it.

    Which operator of PyTorch 2.4 copies is not found; that one does is read off what was reserved. Where the vocabulary
    makes a block of T positions larger than the segment of one of T - 1, there is one more such block with the copy if
    cross entropy is fused, and one less if it is not: so it is in the rows of fms-acceleration.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def shift(logits: Tensor, labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Logits [(T - 1) B, V] and the labels of the positions after them."""
    cut = CopiedGradient.apply(logits[..., :-1, :].contiguous())
    return cut.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1)
