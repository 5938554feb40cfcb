"""Weights whose codes lie along their rows, and products with them, by compiled code: GGUF, NF4, HQQ, torchao.

W[n, k] = (q[n, k] - zeros[n, j]) * scales[n, j] + offsets[n, j], j = k // g, in fp32: a difference, a product and a
sum, each rounded, and left out where a format has none of it. Bit for bit what the formats make of PyTorch's operators.
"""

from __future__ import annotations

import ctypes
import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qzo.errors import QzoError
from qzo.kernels.native import (
    DTYPES,
    LEAST_WEIGHTS,
    NUMBERS,
    NumbersStruct,
    Product,
    RowsStruct,
    library,
    multiplies,
    takes,
    threads_for,
)

RUN = 32  # weights that are unpacked together


class Order(IntEnum):
    """Where the codes of 32 neighbouring weights are in their bytes, see `unpack_run` of qzo/kernels/csrc/rows.h."""

    HALVES = 0  # 16 bytes: weights 0 ... 15 in the low halves, 16 ... 31 in the high ones
    FIFTHS = 1  # the fifth bits in 4 bytes, the others as HALVES
    BYTES = 2  # int8
    UNSIGNED = 3  # uint8
    LOW_FIRST = 4  # 16 bytes, two neighbours in each
    HIGH_FIRST = 5
    PLANES = 6  # groups in rows of bytes, several to a byte: the first of all groups in the highest bits
    WORD_PLANES = 7  # the same in words of 32 bits
    VECTORS_OF_8 = 8  # numbers of vectors in codebooks, as many a vector as there are of these


RUN_BYTES = {Order.HALVES: 16, Order.FIFTHS: 20, Order.BYTES: 32, Order.LOW_FIRST: 16, Order.HIGH_FIRST: 16,
             Order.PLANES: 0, Order.WORD_PLANES: 0, Order.UNSIGNED: 32, Order.VECTORS_OF_8: 4}  # fmt: skip


class Rows(NamedTuple):
    """Rows of a weight [N, K].

    codes: bytes [N, ...], contiguous within a row; of planes [P, g], the groups of all rows, `planes` to a word.
    shape: N, K. scales, zeros, offsets: [N, K / g], any floating dtype (zeros: any), strides and expansion.
    zero: what is taken off each code. table: fp32 [16], what the codes stand for.
    at, run_bytes: where the codes of the first run begin in a row, and bytes from a run to the next, where other bytes
        lie between. plane_bits, planes: of a code, codes to a word. first: number of the first group, of planes.
    codebooks: bf16 [count, a power of two, 8], of VECTORS_OF_8, whose codes are int8 or int16 [N, K / 8, count]; their
        sums are rounded to bf16 one by one.
    """

    codes: Tensor
    order: Order
    shape: tuple[int, int]
    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    zero: int = 0
    table: Tensor | None = None
    at: int = 0
    run_bytes: int | None = None
    plane_bits: int = 8
    planes: int = 1
    first: int = 0
    codebooks: Tensor | None = None


def can_rebuild(rows: Rows, dtype: torch.dtype) -> bool:
    """Whether `rebuild` takes them; it computes no derivatives, backward or forward, and cannot be traced."""
    return dtype in DTYPES and _has_whole_runs(rows) and takes(*_given(rows))


def rebuild(rows: Rows, dtype: torch.dtype) -> Tensor:
    """W [N, K], computed in fp32 and rounded to `dtype`, bf16 or fp32.

    Extra memory: scales, zeros and offsets in fp32. Fake tensors give a fake one. Raises QzoError for shapes that do
    not fit.
    """
    kept = _laid_out(_in_fp32(rows))
    weight = torch.empty(rows.shape, dtype=dtype, device=rows.codes.device)
    if not isinstance(weight, FakeTensor):
        threads = threads_for(weight.numel(), LEAST_WEIGHTS)
        library().qzo_rebuild_by_row(_described(kept), weight.data_ptr(), dtype == torch.bfloat16, threads)
    return weight


def can_multiply(rows: Rows, x: Tensor) -> bool:
    """Whether `multiply` takes these, on this CPU; see `can_rebuild`."""
    return x.shape[-1] == rows.shape[1] and _has_whole_runs(rows) and takes(x, *_given(rows)) and multiplies(x)


def multiply(rows: Rows, x: Tensor) -> Tensor:
    """y = x Wᵀ as `qzo.kernels.native.multiply`, with codes along the rows of W, and numbers read where they are.

    Extra memory: 48 columns of Wᵀ for each thread, and numbers of a dtype that is not one of NUMBERS in fp32.
    """
    kept = _laid_out(rows)
    product = Product(x, rows.shape[1], rows.shape[0])
    if not isinstance(product.y, FakeTensor):
        library().qzo_multiply_by_row(_described(kept), *product.arguments())
    return product.y


def _has_whole_runs(rows: Rows) -> bool:
    depth = rows.shape[1]
    return depth % RUN == 0 and depth % (rows.scales.shape[1] * RUN) == 0


def _given(rows: Rows) -> list[Tensor]:
    every = (rows.codes, rows.scales, rows.zeros, rows.offsets, rows.table, rows.codebooks)
    return [tensor for tensor in every if tensor is not None]


def _laid_out(rows: Rows) -> Rows:
    """With tensors as compiled code reads them, which does not know where they end."""
    count, depth = rows.shape
    codes, (wanted, needed) = rows.codes, (count, rows.at + _run_bytes(rows) * (depth // RUN - 1))
    if rows.order in (Order.PLANES, Order.WORD_PLANES):
        groups = rows.scales.shape[1]
        wanted = -(-(rows.first + count * groups) // rows.planes)
        needed = depth // groups * (4 if rows.order == Order.WORD_PLANES else 1)
    if not (codes.stride(1) == 1 if codes.dim() == 2 else codes[0].is_contiguous()):
        codes = codes.contiguous()
    row_bytes = math.prod(codes.shape[1:]) * codes.element_size()
    if codes.shape[0] < wanted or row_bytes < needed + RUN_BYTES[rows.order]:
        raise QzoError(
            f"codes {tuple(codes.shape)} {codes.dtype} do not fit a weight {rows.shape}; take all of them from one "
            "layer"
        )
    for tensor in (rows.scales, rows.zeros, rows.offsets):
        if tensor is not None and (tensor.shape != rows.scales.shape or tensor.shape[0] != count):
            raise QzoError(
                f"scales, zeros or offsets {tuple(tensor.shape)} do not fit a weight {rows.shape}; take all of them "
                "from one layer"
            )
    if rows.table is not None and tuple(rows.table.shape) != (16,):
        raise QzoError(f"a table of {rows.table.numel()} numbers does not fit codes of 4 bits; give 16")
    if rows.order == Order.VECTORS_OF_8 and not _has_vectors(rows):
        raise QzoError(
            f"codebooks do not fit a weight {rows.shape} with codes {tuple(rows.codes.shape)}; take all of them from "
            "one layer"
        )
    return rows._replace(
        codes=codes,
        scales=_readable(rows.scales),
        zeros=None if rows.zeros is None else _readable(rows.zeros),
        offsets=None if rows.offsets is None else _readable(rows.offsets),
        table=None if rows.table is None else _plain(rows.table),
        codebooks=None if rows.codebooks is None else rows.codebooks.contiguous(),
    )


def _has_vectors(rows: Rows) -> bool:
    books, codes = rows.codebooks, rows.codes
    if books is None or books.dtype != torch.bfloat16 or books.dim() != 3 or books.shape[2] != 8:
        return False
    power_of_two = books.shape[1] & (books.shape[1] - 1) == 0 < books.shape[1]
    shape = (rows.shape[0], rows.shape[1] // 8, len(books))
    return power_of_two and tuple(codes.shape) == shape and codes.dtype in (torch.int8, torch.int16)


def _in_fp32(rows: Rows) -> Rows:
    zeros, offsets = (None if tensor is None else _plain(tensor) for tensor in (rows.zeros, rows.offsets))
    return rows._replace(scales=_plain(rows.scales), zeros=zeros, offsets=offsets)


def _readable(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype in NUMBERS else _plain(numbers)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _run_bytes(rows: Rows) -> int:
    if rows.codebooks is not None:
        return RUN // 8 * len(rows.codebooks) * rows.codes.element_size()
    return RUN_BYTES[rows.order] if rows.run_bytes is None else rows.run_bytes


def _described(rows: Rows) -> ctypes.Structure:
    codes, (count, depth), groups = rows.codes, rows.shape, rows.scales.shape[1]
    table = None if rows.table is None else rows.table.data_ptr()
    places = (codes.data_ptr() + rows.at, rows.order, codes.stride(0) * codes.element_size(), _run_bytes(rows))
    planes = (rows.plane_bits, rows.planes, codes.shape[0])
    books = (None, 0, 0)
    if rows.codebooks is not None:
        books = (rows.codebooks.data_ptr(), *rows.codebooks.shape[:2])
    numbers = (_numbers(rows.scales), _numbers(rows.zeros), _numbers(rows.offsets), depth // groups)
    return RowsStruct(
        *places, *planes, *books, codes.element_size(), rows.first, table, rows.zero, *numbers, depth, count
    )


def _numbers(tensor: Tensor | None) -> NumbersStruct:
    if tensor is None:
        return NumbersStruct(None)
    return NumbersStruct(tensor.data_ptr(), NUMBERS[tensor.dtype], *tensor.stride())
