"""A linear map whose weight exists only in parts: rebuilt, used and dropped chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qzo.kernels.instructions import has_bf16

CHUNK_ELEMENTS = 2**22  # weights that are rebuilt at a time
Rebuild = Callable[..., Tensor]
_kept: dict[Any, Tensor] | None = None  # chunks, within `kept_weights`


@contextmanager
def kept_weights() -> Iterator[None]:
    """Within, a chunk that was rebuilt is kept, and used by every product that needs it again.

    For several passes through weights that nobody changes meanwhile, as when a model writes: each of its tokens would
    rebuild all of them. Products are PyTorch's, to the bit the same as without what is kept. Extra memory: the dense
    weights of all layers that rebuild theirs. Not for several threads.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def keeps_weights() -> bool:
    """Whether this is within `kept_weights`, where a product that rebuilds its weight anew would take longer."""
    return _kept is not None


def chunked_linear(x: Tensor, rebuild: Rebuild, shape: tuple[int, int], *tensors: Tensor) -> Tensor:
    """Compute y = x Wᵀ for a weight [N, K] of which only CHUNK_ELEMENTS exist at a time.

    Args:
        x: [..., K].
        rebuild: `rebuild(start, stop, dtype, *tensors)` returns rows start:stop of W as [stop - start, K] in `dtype`,
            and is differentiable in those of `tensors` that require a gradient.
        shape: N, K.
        tensors: what `rebuild` needs and what may be trained through it.

    Returns:
        [..., N] in x's dtype. Backward rebuilds the chunks and keeps none of them either.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
        y: Tensor = _ChunkedLinear.apply(x, rebuild, shape, *tensors)
        return y
    return _product(x, rebuild, shape, *tensors)  # autograd's bookkeeping takes as long as a small layer


def _product(x: Tensor, rebuild: Rebuild, shape: tuple[int, int], *tensors: Tensor) -> Tensor:
    dtype = _product_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    y = x.new_empty(*x.shape[:-1], shape[0])
    columns = y.view(-1, shape[0])
    for start, stop in _walked(shape, x):
        weight = _weight(rebuild, start, stop, dtype, *tensors)
        if dtype == x.dtype:
            torch.mm(flat, weight.t(), out=columns[:, start:stop])
        else:
            columns[:, start:stop].copy_(flat @ weight.t())
        del weight  # before the next chunk is born
    return y


def _weight(rebuild: Rebuild, start: int, stop: int, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """A chunk, rebuilt or from the last time; `rebuild` is a bound method, so it tells whose chunk it is."""
    if _kept is None:
        return rebuild(start, stop, dtype, *tensors)
    key = rebuild, start, stop, dtype
    if key not in _kept:
        _kept[key] = rebuild(start, stop, dtype, *tensors)
    return _kept[key]


def chunk_bounds(n_rows: int, n_columns: int) -> list[tuple[int, int]]:
    """Rows start:stop of the chunks of an [n_rows, n_columns] weight."""
    step = max(1, CHUNK_ELEMENTS // n_columns)
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _walked(shape: tuple[int, int], x: Tensor) -> list[tuple[int, int]]:
    """The chunks that are computed: without data the first two and the last, as those between hold the same memory."""
    bounds = chunk_bounds(*shape)
    return [*bounds[:2], bounds[-1]] if x.is_meta and len(bounds) > 3 else bounds


class _ChunkedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rebuild: Rebuild, shape: tuple[int, int], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.rebuild, ctx.shape = rebuild, shape
        return _product(x, rebuild, shape, *tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        flat, grad_y = x.reshape(-1, ctx.shape[1]), grad_outputs[0].reshape(-1, ctx.shape[0])
        trained = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        grad_x = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(tensor) if i in trained else None for i, tensor in enumerate(tensors)]
        for start, stop in _walked(ctx.shape, x):
            leaves = [tensor.detach().requires_grad_(i in trained) for i, tensor in enumerate(tensors)]
            with torch.enable_grad():
                weight = ctx.rebuild(start, stop, x.dtype, *leaves)
            if grad_x is not None:
                grad_x.addmm_(grad_y[:, start:stop], weight.detach())
            if trained:
                grad_weight = grad_y[:, start:stop].t() @ flat
                parts = torch.autograd.grad(weight, [leaves[i] for i in trained], grad_weight)
                for i, part in zip(trained, parts, strict=True):
                    grads[i].add_(part)  # type: ignore[union-attr]
            del weight
        return (None if grad_x is None else grad_x.view_as(x), None, None, *grads)


def _product_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, but fp32 on a CPU without 16-bit instructions, where 16-bit products are five times slower."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    return x.dtype if x.dtype == torch.bfloat16 and has_bf16() else torch.float32
