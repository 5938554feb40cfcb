"""The log-probability of each label from tiles of logits in one buffer, made again in backward.

A Triton kernel folds each tile into a few numbers a token; here `_fold` and `_gradient` do so on tensors with data, and
nothing on those without, since the kernel has no tensors of its own.

Source: TRL 1.16, kernels/chunked_logprob.py and trainer/utils.py, `add_fused_lm_head`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.methods.losses.logits import IGNORED, bent
from bench.methods.optimizers.in_place import has_data, numbers, write

TILE_TOKENS, TILE_WORDS = 4096, 32768  # TOKEN_CHUNK_SIZE and _CHUNKED_LOGPROB_CHUNK_SIZE


class TiledLoss:
    """The log-probability of each label from tiles of logits in one buffer, made again in backward (TRL 1.16)."""

    def __init__(self, scale: float, softcap: float | None) -> None:
        self.scale, self.softcap = scale, softcap

    def __call__(self, hidden: Tensor, head: Any, labels: Tensor, items: Any) -> Tensor:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        mask = labels != IGNORED
        batch, tokens = mask.shape
        # `hidden[mask]` makes these two of the mask, whose tokens all count here
        rows, columns = (torch.arange(size, device=hidden.device) for size in mask.shape)
        at = rows.repeat_interleave(tokens), columns.repeat(batch)
        log_probs, entropy = _Tiles.apply(hidden[at], head.weight, head.bias, labels[at], self.scale, self.softcap)
        log_probs, entropy = log_probs.view(mask.shape), entropy.view(mask.shape)
        return (-log_probs).sum() / (mask.sum() if items is None else items)


class _Tiles(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias, targets [N]) -> log-probabilities and entropies [N], in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype = _compute_dtype(hidden)
        ctx.bends = scale, softcap
        number = len(hidden)
        # maximum, sum of exp, of x exp, of exp², of logits, maximum before the target, the target's logit
        state = [hidden.new_full((number,), -torch.inf, dtype=torch.float32)]
        state += [hidden.new_zeros(number, dtype=torch.float32) for _ in range(4)]
        state += [hidden.new_full((number,), -torch.inf, dtype=torch.float32)]
        state += [hidden.new_zeros(number, dtype=torch.float32)]
        buffer = hidden.new_empty((min(number, TILE_TOKENS), TILE_WORDS), dtype=ctx.dtype)
        for tokens in _spans(number, TILE_TOKENS):
            rows = hidden[tokens].to(ctx.dtype)
            for words in _spans(len(weight), TILE_WORDS):
                tile = _logits(buffer, rows, weight[words].to(ctx.dtype), None if bias is None else bias[words])
                _fold(tile, [item[tokens] for item in state], targets[tokens], words.start, scale, softcap)
        log_z = state[0] + torch.log(state[1])
        log_probs = state[6] - log_z
        entropy = log_z - state[2] / state[1]
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, _entropy = ctx.saved_tensors
        gradients = [
            torch.zeros(item.shape, device=item.device, dtype=torch.float32) if wanted else None
            for item, wanted in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        of_hidden, of_weight, of_bias = gradients
        buffer = hidden.new_empty((min(len(hidden), TILE_TOKENS), TILE_WORDS), dtype=ctx.dtype)
        grad = grad.float().contiguous()
        for tokens in _spans(len(hidden), TILE_TOKENS):
            rows = hidden[tokens].to(ctx.dtype)
            for words in _spans(len(weight), TILE_WORDS):
                part = weight[words].to(ctx.dtype)
                tile = _logits(buffer, rows, part, None if bias is None else bias[words])
                _gradient(tile, targets[tokens], log_z[tokens], grad[tokens], words.start, *ctx.bends)
                if of_hidden is not None:
                    add_product(of_hidden[tokens], tile, part)
                if of_weight is not None:
                    add_product(of_weight[words], tile.t(), rows)
                if of_bias is not None:
                    of_bias[words] += tile.sum(dim=0, dtype=torch.float32)
        return (
            tuple(
                None if item is None else item.to(of.dtype)
                for item, of in zip(gradients, (hidden, weight, bias), strict=True)
            )
            + (None,) * 3
        )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = "cuda" if hidden.is_meta else hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _spans(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _logits(buffer: Tensor, rows: Tensor, part: Tensor, bias: Tensor | None) -> Tensor:
    """A tile in the buffer."""
    tile = buffer[: len(rows), : len(part)]
    torch.mm(rows, part.t(), out=tile)
    return tile if bias is None else tile.add_(bias.to(tile.dtype))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in fp32, which on a GPU one call does for operands of 16 bits (`out_dtype`)."""
    if total.is_meta:
        return
    total.addmm_(left.float(), right.float())


def _fold(tile: Tensor, state: list[Tensor], targets: Tensor, start: int, scale: float, softcap: float | None) -> None:
    """One tile into the running statistics of its tokens."""
    if not has_data(tile):
        return
    z = bent(numbers(tile), scale, softcap)
    maximum, total, weighted, target = (state[index].numpy() for index in (0, 1, 2, 6))
    above = np.maximum(maximum, z.max(-1))
    shrunk, e = np.exp(maximum - above), np.exp(z - above[:, None])
    total[:] = total * shrunk + e.sum(-1)
    weighted[:] = weighted * shrunk + (e * z).sum(-1)
    maximum[:] = above
    local = targets.numpy() - start
    inside = (local >= 0) & (local < z.shape[1])
    target[inside] = z[inside, local[inside]]


def _gradient(
    tile: Tensor, targets: Tensor, log_z: Tensor, grad: Tensor, start: int, scale: float, softcap: float | None
) -> None:
    """Logits become grad x (one at the target - softmax), in the tile."""
    if not has_data(tile):
        return
    raw = numbers(tile)
    z = bent(raw, scale, softcap)
    slope = scale if softcap is None else scale * (1 - (z / softcap) ** 2)
    p = np.exp(z - log_z.numpy()[:, None])
    local = targets.numpy() - start
    inside = (local >= 0) & (local < z.shape[1])
    p[inside, local[inside]] -= 1
    write(tile, -p * grad.numpy()[:, None] * slope)
