"""What the kernels of scaled_dot_product_attention hold on a GPU while they run, besides their results.

cuDNN's workspaces are its own choice and documented nowhere, so they are left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.cases.gpus import Gpu
from bench.ledger.ledger import Ledger, Rule
from bench.simulator.cuda.attention import AMPERE, HALF, Capability
from bench.simulator.cuda.temporaries import hold, run_seen, with_temporaries

aten = torch.ops.aten

FP32_BYTES = 4
LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))  # GPUs with room for blocks of 128 x 128
SPLIT_BLOCKS = 200  # attention_backward.cu: blocks over keys, batch and heads that accumulate in a workspace
MANY_BLOCKS = 256  # attention_backward.cu: batch times heads from which short sequences are not split


def attention_rules(gpu: Gpu) -> dict[Any, Rule]:
    """Operator -> rule for what attention's kernels hold on `gpu` while they run."""

    def flash(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
        return with_temporaries(ledger, func, args, kwargs, flash_forward_bytes(gpu, *args[:2], *args[3:4]))

    def efficient_backward(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
        """Sums for each row, for fp32 of a product of output and its gradient, then the workspace
        (attention_backward.cu, _efficient_attention_backward).
        """
        grad, query, key = args[:3]
        copy = copy_bytes(grad)
        rows = query.numel() // query.shape[-1] * FP32_BYTES
        out = run_seen(ledger, func, args, kwargs)
        if query.dtype not in HALF:
            hold(ledger, [copy, query.nbytes, rows])
        hold(ledger, [copy, rows, efficient_workspace_bytes(gpu.compute_capability, query, key)])
        return out

    return {
        aten._scaled_dot_product_flash_attention.default: flash,
        aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
        aten._scaled_dot_product_efficient_attention.default: efficient,
        aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
        aten._safe_softmax.default: safe_softmax,
    }


def flash_forward_bytes(gpu: Gpu, query: Tensor, key: Tensor, dropout: float = 0.0) -> list[int]:
    """Where batch and heads leave multiprocessors idle, keys are split and each part has a log-sum-exp and an output
    of its own in fp32 (flash_api.cpp, set_params_splitkv).
    """
    batch, heads, queries, head_dim = query.shape
    block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    blocks = batch * heads * -(-queries // 64)
    splits = 1 if dropout else key_splits(blocks, 2 * gpu.multiprocessors, -(-key.shape[2] // block))
    rows = splits * batch * heads * queries * FP32_BYTES
    return [rows, rows * _rounded_head(head_dim)] if splits > 1 else []


def key_splits(blocks: int, multiprocessors: int, key_blocks: int) -> int:
    """The fewest parts of the keys that keep at least 85 % as many multiprocessors busy as the best number of parts
    (flash_api.cpp, num_splits_heuristic).
    """
    if blocks >= 0.8 * multiprocessors:
        return 1
    busy = {}
    for splits in range(1, min(128, multiprocessors, key_blocks) + 1):
        if splits == 1 or -(-key_blocks // splits) != -(-key_blocks // (splits - 1)):
            waves = blocks * splits / multiprocessors
            busy[splits] = waves / math.ceil(waves)
    return next(splits for splits, share in busy.items() if share >= 0.85 * max(busy.values()))


def _rounded_head(head_dim: int) -> int:
    multiple = 32 if head_dim <= 128 else 64
    return -(-head_dim // multiple) * multiple


def flash_backward(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """Sums for each row and the gradient of q accumulate in fp32; gradients of shared key and value heads come out for
    each query head first (flash_api.cpp, mha_bwd).
    """
    grad, query, key = args[:3]
    batch, heads, queries, head_dim = query.shape
    rows = batch * heads * -(-queries // 128) * 128 * FP32_BYTES
    sizes = [copy_bytes(grad), rows, rows * _rounded_head(head_dim)]
    if key.shape[1] != heads:
        sizes += [key.nbytes // key.shape[1] * heads] * 2
    return with_temporaries(ledger, func, args, kwargs, sizes)


def efficient(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """Heads of more than 128 do not fit in registers: a half-precision output accumulates in fp32 (attention.cu,
    _efficient_attention_forward, kNeedsOutputAccumulatorBuffer).
    """
    query, value = args[0], args[2]
    wide = query.dtype in HALF and max(query.shape[-1], value.shape[-1]) > 128
    return with_temporaries(ledger, func, args, kwargs, [query.numel() * FP32_BYTES] if wide else [])


def efficient_workspace_bytes(gpu: Capability, query: Tensor, key: Tensor) -> int:
    """Where the gradient of q accumulates in fp32, and those of k and v where registers cannot hold them
    (kernel_backward.h, workspace_size).
    """
    batch, heads, queries, head_dim = query.shape
    height, width, in_registers = backward_block(gpu, query.dtype, head_dim)
    tiles = -(-queries // height) * -(-head_dim // width)
    elements = tiles * (height * width + 4)  # a lock and a counter, 16 bytes, before each
    if not in_registers:
        keys = key.shape[2]
        splits = max(1, min(-(-keys // width), SPLIT_BLOCKS // (batch * heads)))
        if batch * heads >= MANY_BLOCKS and keys <= 2 * width:
            splits = 1
        elements += 2 * splits * (-(-keys // width) * width) * (-(-head_dim // height) * height)
    return batch * heads * elements * FP32_BYTES


def backward_block(gpu: Capability, dtype: torch.dtype, head_dim: int) -> tuple[int, int, bool]:
    """(queries, keys) of a block, and whether gradients of k and v need no workspace (cutlassB.h: the first kernel in
    the list that takes the head and fits in shared memory). An fp32 gradient accumulates in itself.
    """
    if dtype not in HALF:
        return (128, 64, True) if gpu >= AMPERE and head_dim > 64 else (64, 64, True)
    if head_dim <= 64:
        return 64, 64, True
    if gpu < AMPERE or head_dim > 128:
        return 128, 64, head_dim <= 128
    if gpu in LARGE_SHARED_MEMORY:
        return 128, 128, True
    return (128, 64, True) if head_dim <= 96 and gpu in ((8, 6), (8, 9)) else (64, 64, False)


def safe_softmax(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """Marks what is -inf and the rows that are so throughout (transformers/attention.cpp, _safe_softmax)."""
    scores, dim = args[0], args[1]
    sizes = [scores.numel(), scores.numel() // scores.shape[dim]]
    return with_temporaries(ledger, func, args, kwargs, sizes)


def copy_bytes(grad: Tensor) -> int:
    """What it takes to lay a gradient out as [batch, tokens, heads, head_dim], as the backward kernels want it."""
    return 0 if grad.transpose(1, 2).is_contiguous() else grad.nbytes
