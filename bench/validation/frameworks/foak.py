"""The fused kernels of fms-acceleration (plugins/fused-ops-and-kernels), as far as they allocate.

What a Triton kernel does in place stays in place: the norm's backward writes over the gradient it gets, rotary
embedding over queries and keys, cross entropy over the logits. Norm weights get no gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from bench.validation.frameworks.transformers_4 import base_of, shift


class FastNorm(Function):
    """RMSNorm of X [B, T, H] in one kernel (kernels/unsloth/rms_layernorm.py)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1].numel(), dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class FastRope(Function):
    """Rotary embedding of [B, T, heads, D] in place (kernels/unsloth/rope_embedding.py)."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor) -> Tensor:
        return heads.view(heads.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.reshape(grad.shape[0] * grad.shape[1], -1).view(grad.shape)


class FastCrossEntropy(Function):
    """Losses of logits [N, V], whose gradient takes their place (kernels/unsloth/cross_entropy_loss.py)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, logits.new_empty(logits.shape[0], dtype=torch.float32), labels)
        return logits.new_empty(logits.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0], None


class FusedHeadLoss(Function):
    """Cross entropy fused with the head, chunk by chunk (fused_ops/liger_ce). Gradients are made in the forward.

    Args:
        hidden: [N, H]. weight: [V, H]. dtype: of the products, that of autocast where it is on.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        chunk = _next_power_of_two(-(-rows // -(-vocabulary // hidden.shape[1])))
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        grad, losses = torch.zeros_like(hidden), hidden.new_zeros(rows, dtype=torch.float32)
        lowered = weight.to(dtype)
        for start in range(0, rows, chunk):
            part = hidden[start : start + chunk]
            logits = (part.to(dtype) @ lowered.t()).float()
            logits = logits.to(dtype)
            scaled = logits * 1.0
            grad[start : start + chunk] = scaled @ lowered
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), part)
        ctx.save_for_backward(grad, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *ctx.saved_tensors, None


class FusedLora(Function):
    """The products of several LoRA layers with one X [B, T, K], base and adapters in one node (fused_ops/unsloth_lora).

    Each keeps X after its own dropout, and the backward makes the gradient of X in X's place where the base layer is
    bitsandbytes', whose `layers` are unpacked one by one. GPTQ's are unpacked all at once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layers: tuple[Any, ...], *adapters: Tensor) -> Any:
        gptq = hasattr(layers[0].base_layer, "qweight")
        rows = hidden.view(-1, hidden.shape[-1])
        unpacked = [_unpacked(layer, rows) for layer in layers] if gptq else []
        dropped, outputs = [], []
        for index, layer in enumerate(layers):
            weight = unpacked[index] if gptq else _unpacked(layer, rows)
            out = rows @ weight
            del weight
            kept = layer.lora_dropout["default"](rows)
            first, second = (item.t().to(rows.dtype) for item in adapters[2 * index : 2 * index + 2])
            out += (kept @ first) @ second
            dropped.append(kept)
            outputs.append(out.view(*hidden.shape[:-1], -1))
        ctx.layers, ctx.gptq = layers, gptq
        ctx.save_for_backward(hidden, *adapters, *dropped)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, *saved = ctx.saved_tensors
        number = len(ctx.layers)
        adapters, dropped = saved[: 2 * number], saved[2 * number :]
        rows = hidden.view(-1, hidden.shape[-1])
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        small: list[Tensor] = []
        for index, grad in enumerate(flat):
            first, second = (item.t().to(rows.dtype) for item in adapters[2 * index : 2 * index + 2])
            d_first, d_second = dropped[index].t() @ (grad @ second.t()), (first.t() @ dropped[index].t()) @ grad
            small += [d_first.t().to(adapters[0].dtype), d_second.t().to(adapters[0].dtype)]
        total: Tensor | None = None
        for index, grad in enumerate(flat):
            weight = _unpacked(ctx.layers[index], rows)
            if total is None:
                total = grad @ weight.t() if ctx.gptq or number == 1 else torch.matmul(grad, weight.t(), out=rows)
            else:
                total += grad @ weight.t()
            del weight
            first, second = (item.t().to(rows.dtype) for item in adapters[2 * index : 2 * index + 2])
            total += (dropped[index] != 0) * (grad @ second.t() @ first.t())
        assert total is not None
        return total.view(hidden.shape), None, *small


def _unpacked(layer: Any, like: Tensor) -> Tensor:
    """The base layer's weight [K, N] in 16 bits, with what is unpacked on the way."""
    base = layer.base_layer
    if hasattr(base, "qweight"):
        return like.new_empty(base.in_features, base.out_features)
    state = base.weight.quant_state
    weight = torch.empty(state.shape, dtype=state.dtype, device=like.device)
    torch.empty(state.absmax.numel(), dtype=torch.float32, device=like.device)
    return weight.t()


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def fuse(norms: bool, rope: bool, adapters: bool) -> Callable[[nn.Module], None]:
    """The change that puts these kernels in place of a model's own norms, rotary embedding and LoRA products."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if norms and type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(_norm, module)
            if rope and type(module).__name__.endswith("Attention"):
                module.forward = partial(_rotated, module.forward, sys.modules[type(module).__module__])
            if adapters and hasattr(getattr(module, "q_proj", None), "lora_A"):
                _fuse_adapters(module)

    return change


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    return FastNorm.apply(hidden, norm.weight)


def _rotated(forward: Callable[..., Any], modeling: Any, *args: Any, **kwargs: Any) -> Any:
    with _rotary(modeling):
        return forward(*args, **kwargs)


@contextmanager
def _rotary(modeling: Any) -> Iterator[None]:
    """Within the context the modeling file rotates queries and keys in place."""
    original = modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = _rotate
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = original


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Of q and k [B, heads, T, D]."""
    query, key = (FastRope.apply(item.transpose(1, 2)).transpose(1, 2) for item in (query, key))
    return query, key


def _fuse_adapters(attention: Any) -> None:
    waiting: dict[int, Tensor] = {}
    first, last = (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)

    def product(index: int, hidden: Tensor) -> Tensor:
        if not waiting:
            waiting.update(enumerate(FusedLora.apply(hidden, first, *_adapters_of(first))))
        return waiting.pop(index)

    for index, layer in enumerate(first):
        layer.forward = partial(product, index)
    attention.o_proj.forward = lambda hidden: FusedLora.apply(hidden, last, *_adapters_of(last))[0]


def _adapters_of(layers: tuple[Any, ...]) -> list[Tensor]:
    return [layer.get_submodule(name)["default"].weight for layer in layers for name in ("lora_A", "lora_B")]


def fast_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """As transformers' loss of 4.46 calls the kernel; earlier the logits are in fp32 already."""
    logits = logits.float()
    shifted, targets = shift(logits, labels, vocab_size)
    return FastCrossEntropy.apply(shifted, targets).sum()


def fast_loss_of_given(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The kernel on logits as they come, in the place of torch's cross entropy."""
    shifted, targets = shift(logits, labels, vocab_size)
    return FastCrossEntropy.apply(shifted, targets).sum()


def fuse_head_loss(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """The change that makes loss and head one kernel, whose products are of this dtype; there are no logits."""

    def change(model: nn.Module) -> None:
        inner = base_of(model)
        inner.forward = partial(_head_loss, inner, dtype)

    return change


def _head_loss(model: Any, dtype: torch.dtype, input_ids: Tensor, labels: Tensor, **options: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    hidden = model.model(input_ids=input_ids, attention_mask=options.get("attention_mask"))[0]
    shifted = hidden[..., :-1, :].contiguous().view(-1, hidden.shape[-1])
    return CausalLMOutputWithPast(loss=FusedHeadLoss.apply(shifted, model.lm_head.weight, dtype))
