"""What CPU kernels allocate inside themselves, unseen by ledger and fake kernels: one small rule for each fact.

Left out are a few KiB that depend on no tensor's size: the blocks in which `copy_` transposes and the partial sums of
LayerNorm's backward. These rules are read off PyTorch's sources and hold whatever instructions a CPU has
(`ATEN_CPU_CAPABILITY`). What a product in bf16 takes does depend on them (AVX512, AVX512-BF16, AMX;
`ONEDNN_MAX_CPU_ISA`), and so does attention in bf16, which multiplies block by block. No rule is written down for
these: the kernel itself is asked (bench/simulator/cpu/scratch.py). What else oneDNN allocates passes PyTorch's
allocator by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.ledger.ledger import Ledger, Rule
from bench.simulator.cpu.bitsandbytes import optimizer_rules
from bench.simulator.cpu.scratch import inside, takes_scratch
from bench.simulator.shared import IN_PLACE, OUT, grouped_product, keep_layers, route_evenly, write

aten = torch.ops.aten

ARITHMETIC = ("add", "sub", "mul", "div")
# (from so many queries on, that many are taken at a time): flash_attention_kernel_impl in FlashAttentionKernel.cpp.
QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
KEY_BLOCK = 512
FP32_BYTES = 4  # the kernel accumulates in fp32
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mm.out)


def rules(experts: int = 1, padded: bool = False) -> dict[Any, Rule]:
    """Operator -> rule for a step on fake CPU tensors; `experts` is the model's number of experts a layer, `padded`
    tells that masks are not all ones.
    """
    table: dict[Any, Rule] = {
        aten._local_scalar_dense.default: partial(read_scalar, padded),
        aten.nonzero.default: partial(route_evenly, experts),
        aten.rand.default: keep_layers,
        aten._grouped_mm.default: grouped_product,
        aten._safe_softmax.default: safe_softmax,
        aten._scaled_dot_product_flash_attention_for_cpu.default: partial(scratch_of, flash_attention),
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: partial(
            scratch_of, flash_attention_backward
        ),
    }
    for name in IN_PLACE + OUT:
        packet, overload = name.split(".")
        table[getattr(getattr(aten, packet), overload)] = write
    for name in ARITHMETIC:
        for packet in (getattr(aten, name), getattr(aten, f"{name}_")):
            table[packet.Tensor] = mixed_arithmetic
    for product in PRODUCTS:
        table[product] = partial(scratch_of, run)
    table |= optimizer_rules()
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # there once the package is imported
        table[torch.ops.bitsandbytes.gemm_4bit.default] = partial(scratch_of, nf4_product)
    return table


def run(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """What a rule does where there is nothing to add."""
    return func(*args, **kwargs)


def scratch_of(otherwise: Rule, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """What multiplies in bf16 by a kernel that tells itself what it takes, see bench/simulator/cpu/scratch.py; any
    other by `otherwise`.
    """
    if not takes_scratch(*(item for item in args if isinstance(item, Tensor))):
        return otherwise(ledger, func, args, kwargs)
    return with_temporaries(ledger, func, args, kwargs, [inside(func, args, kwargs)])


def read_scalar(padded: bool, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> bool | float | int:
    """`.item()` of a tensor without data: losses are 0.0, "is the mask all ones" holds unless batches are `padded`."""
    tensor = args[0]
    if getattr(tensor, "constant", None) is not None:  # a fake `torch.tensor(3.0)` keeps its value
        return func(*args, **kwargs)
    if tensor.dtype is torch.bool:
        return not padded
    return 0.0 if tensor.is_floating_point() else 0


def mixed_arithmetic(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """An operand of another dtype than the result's is cast into a temporary first, and a result that goes into a
    tensor of another dtype is computed in a temporary (TensorIterator.cpp, compute_types: on CPU alone).
    """
    operands = [item for item in args[:2] if isinstance(item, Tensor)]
    if len(operands) < 2:
        return func(*args, **kwargs)
    common = torch.result_type(*operands)
    written = [args[0]] if func.overloadpacket.__name__.endswith("_") else []
    cast = [item for item in operands + written if item.dtype != common]
    return with_temporaries(ledger, func, args, kwargs, (item.numel() * common.itemsize for item in cast))


def safe_softmax(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Attention's math kernel marks in the softmax what was -inf and the rows that were so throughout, and zeroes those
    in place (transformers/attention.cpp, _safe_softmax).
    """
    scores, dim = args[0], args[1]
    return with_temporaries(ledger, func, args, kwargs, (scores.numel(), scores.numel() // scores.shape[dim]))


def flash_attention(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """Each thread holds a block of scores, two values for each of its rows and the output's block, in fp32, and for a
    half-precision input the scores once more in its dtype (FlashAttentionKernel.cpp, cpu_flash_attention).
    """
    query, key = args[0], args[1]
    rows, columns = attention_block(query, key)
    wide = rows * columns + 2 * rows + rows * query.shape[-1]
    return with_temporaries(ledger, func, args, kwargs, per_thread(query, wide, rows * columns))


def flash_attention_backward(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """As forward, with two blocks of scores, theirs and their gradient's, and where the output's gradient is not laid
    out as [batch, tokens, heads, head_dim] a copy that is (cpu_flash_attention_backward). Each thread makes a sum for
    every row of its block, too; PyTorch's events tell only of those of the thread that called, and so does this.
    """
    grad, query, key = args[:3]
    rows, columns = attention_block(query, key)
    sizes = [*per_thread(query, 2 * rows * columns, 2 * rows * columns), rows * FP32_BYTES]
    if not grad.transpose(1, 2).is_contiguous():
        sizes.append(grad.numel() * grad.element_size())
    return with_temporaries(ledger, func, args, kwargs, sizes)


def attention_block(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Queries and keys that a thread takes at a time; q and k are [batch, heads, tokens, head_dim]."""
    tokens = query.shape[2]
    rows = next(rows for least, rows in QUERY_BLOCKS if tokens >= least)
    return min(rows, tokens), min(KEY_BLOCK, key.shape[2])


def per_thread(query: Tensor, wide: int, narrow: int) -> list[int]:
    """Bytes of `wide` fp32 elements a thread and, for a half-precision input, of `narrow` elements of its dtype."""
    halves = narrow * query.element_size() if query.element_size() < FP32_BYTES else 0
    return [torch.get_num_threads() * wide * FP32_BYTES, torch.get_num_threads() * halves]


def nf4_product(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """bitsandbytes dequantizes the whole weight before the product (backends/default/ops.py, gemm_4bit)."""
    weight = math.prod(args[2]) * args[0].element_size()
    return with_temporaries(ledger, func, args, kwargs, [weight])


def with_temporaries(ledger: Ledger, func: Any, args: tuple, kwargs: dict, sizes: Iterable[int]) -> Any:
    """Run the operator; until it is done temporaries of these sizes, in bytes, are alive beside its results."""
    blocks = [ledger.allocate(nbytes) for nbytes in sizes if nbytes]
    out = func(*args, **kwargs)
    for item in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(item, Tensor):
            ledger.see(item)
    for block in blocks:
        ledger.release(block)
    return out
