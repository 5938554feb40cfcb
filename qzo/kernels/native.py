"""Weights from packed codes, products with them, and z, on a CPU by compiled code (qzo/kernels/csrc).

Here of codes that lie along the columns of a weight [N, K], as GPTQ has them; along its rows: by_row.py.

Installing the package compiles it where there is a compiler. PyTorch's operators do the same work elsewhere: they come
to the same weights and the same z, bit for bit, in five passes over weights, where compiled code needs one; and a
product by compiled code rebuilds a layer in parts that stay within the cache, so that it costs no more than one with a
dense weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.forward_ad import unpack_dual

from qzo.errors import QzoError
from qzo.kernels.instructions import has_bf16, has_tiles
from qzo.kernels.rebuilt import keeps_weights

DTYPES = (torch.bfloat16, torch.float32)  # of rebuilt weights
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # that compiled code reads
KINDS = (Tensor, nn.Parameter, FakeTensor)  # other subclasses may keep their data elsewhere
# Weights, and multiplications, from which on it is worth to wake the other threads; all of them, as PyTorch does, or
# the OpenMP runtime would end and start them again and again.
LEAST_WEIGHTS, LEAST_MULTIPLICATIONS = 2**15, 2**20
_allowed, _on_tiles = True, False


class Codes(NamedTuple):
    """Wᵀ[k, n] = (codes[k, n] - zeros[g_idx[k], n]) * scales[g_idx[k], n].

    words: int32 [K * n_bits / 32, N], packed as in qzo/formats/gptq/codes.py. scales: [K / g, N] of any floating point
        dtype.
    zeros: int32 [K / g, N], or the one zero point of all. g_idx: int32 [K], or None for k // g.
    awq: whether words are int32 [K, N / 8], packed as in qzo/formats/awq/layer.py.
    """

    words: Tensor
    n_bits: int
    scales: Tensor
    zeros: Tensor | int
    g_idx: Tensor | None
    awq: bool = False


def is_compiled() -> bool:
    """Whether there is compiled code here, and it can be loaded."""
    return library() is not None


@contextmanager
def by_operators() -> Iterator[None]:
    """Within, everything is done as where there is no compiled code, to compare one with the other."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@contextmanager
def products_on_tiles() -> Iterator[None]:
    """Within, compiled products serve a CPU with tiles (AMX) too, to compare them with PyTorch's."""
    global _on_tiles
    before, _on_tiles = _on_tiles, True
    try:
        yield
    finally:
        _on_tiles = before


def can_rebuild(words: Tensor, n_bits: int, scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether `rebuild` takes such codes; it computes no derivatives, backward or forward, and cannot be traced."""
    return words.dtype == torch.int32 and takes(words, scales) and dtype in DTYPES


def can_multiply(words: Tensor, n_bits: int, scales: Tensor, x: Tensor) -> bool:
    """Whether `multiply` takes these, on this CPU; see `can_rebuild`."""
    return words.dtype == torch.int32 and takes(words, scales, x) and multiplies(x)


def multiplies_here() -> bool:
    """Whether products are compiled code's on this CPU: it has AVX512-BF16, and no tiles, which PyTorch's use."""
    return is_compiled() and _panel_columns() > 0 and has_bf16() and (_on_tiles or not has_tiles())


def multiplies(x: Tensor) -> bool:
    """Whether products with x are compiled code's here and now."""
    return x.dtype == torch.bfloat16 and multiplies_here() and not keeps_weights()


def rebuild(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Wᵀ [K, N], computed in fp32 and rounded to `dtype`, bf16 or fp32.

    Extra memory: the scales in fp32. Fake tensors give a fake one. Raises QzoError for shapes that do not fit and for
    a group that does not exist.
    """
    kept = _laid_out(codes._replace(scales=codes.scales.detach().float()))
    weight = torch.empty(_shape(kept), dtype=dtype, device=kept.words.device)
    if not isinstance(weight, FakeTensor):
        is_bf16 = dtype == torch.bfloat16
        threads = threads_for(weight.numel(), LEAST_WEIGHTS)
        _check(library().qzo_rebuild(_described(kept), weight.data_ptr(), is_bf16, threads), kept)
    return weight


def multiply(codes: Codes, x: Tensor) -> Tensor:
    """y = x Wᵀ with W rounded to bf16: x [..., K] and y [..., N] in bf16, sums in fp32.

    A row of y does not depend on how many rows x has, nor on the number of threads. Extra memory: 48 columns of Wᵀ for
    each thread, and scales that are not contiguous, or in fp64. Fake tensors give a fake y. Raises QzoError for shapes
    that do not fit and for a group that does not exist.
    """
    kept = _laid_out(codes)
    depth, columns = _shape(kept)
    product = Product(x, depth, columns)
    if not isinstance(product.y, FakeTensor):
        _check(library().qzo_multiply(_described(kept), *product.arguments()), kept)
    return product.y


class Product:
    """y = x Wᵀ for a W [columns, depth], both bf16: what compiled code is given besides W."""

    def __init__(self, x: Tensor, depth: int, columns: int) -> None:
        """Make y, and what the threads work in."""
        rows = x.reshape(-1, depth)
        self.rows = rows if rows.stride(1) == 1 else rows.contiguous()
        self.y = x.new_empty(*x.shape[:-1], columns)
        work = depth * columns * (16 + rows.shape[0])  # rebuilding a weight takes as long as 16 multiplications with it
        self.threads = threads_for(work, LEAST_MULTIPLICATIONS)
        self.panels = x.new_empty(self.threads, depth, _panel_columns())

    def arguments(self) -> tuple[int, ...]:
        """Pointers and sizes."""
        rows = self.rows
        return rows.data_ptr(), rows.stride(0), rows.shape[0], self.y.data_ptr(), self.panels.data_ptr(), self.threads


def threads_for(work: int, least: int) -> int:
    """All of PyTorch's threads, or one where they are not worth waking."""
    return torch.get_num_threads() if work >= least else 1


def takes(*tensors: Tensor) -> bool:
    """Whether compiled code is here, may run, and can read these tensors and need not tell their derivatives."""
    return (
        _allowed
        and not torch.compiler.is_compiling()
        and is_compiled()
        and all(type(tensor) in KINDS and tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and all(unpack_dual(tensor).tangent is None for tensor in tensors)
    )


def _laid_out(codes: Codes) -> Codes:
    """With tensors as compiled code reads them, which does not know where they end."""
    words, _, scales, zeros, g_idx, _ = codes
    depth, columns = _shape(codes)
    fits = scales.dim() == 2 and scales.shape[1] == columns and scales.shape[0] > 0
    fits = fits and (g_idx is not None or depth % scales.shape[0] == 0)
    if not fits or (isinstance(zeros, Tensor) and zeros.shape != scales.shape):
        raise QzoError(
            f"scales {tuple(scales.shape)} or their zero points do not fit a weight [{columns}, {depth}]; take all of "
            "them from one layer"
        )
    if g_idx is not None and g_idx.shape != (depth,):
        raise QzoError(f"g_idx has shape {tuple(g_idx.shape)}, the weight {depth} columns; take both from one layer")
    scales = scales.contiguous()
    return codes._replace(
        words=words if words.stride(1) == 1 else words.contiguous(),
        scales=scales if NUMBERS.get(scales.dtype, 3) < 3 else scales.float(),
        zeros=zeros.int().contiguous() if isinstance(zeros, Tensor) else zeros,
        g_idx=None if g_idx is None else g_idx.int().contiguous(),
    )


def _shape(codes: Codes) -> tuple[int, int]:
    rows, columns = codes.words.shape
    return (rows, columns * 8) if codes.awq else (rows * 32 // codes.n_bits, columns)


class _Codes(ctypes.Structure):
    """`Codes` of qzo/kernels/csrc/codes.h."""

    _fields_ = (
        *(("words", ctypes.c_void_p), ("words_stride", ctypes.c_int64)),
        *(("awq", ctypes.c_int64), ("n_bits", ctypes.c_int64)),
        *(("scales", ctypes.c_void_p), ("scale_kind", ctypes.c_int64)),
        *(("zeros", ctypes.c_void_p), ("zero", ctypes.c_int64)),
        *(("g_idx", ctypes.c_void_p), ("groups", ctypes.c_int64), ("group_size", ctypes.c_int64)),
        *(("k", ctypes.c_int64), ("n", ctypes.c_int64)),
    )


class NumbersStruct(ctypes.Structure):
    """`Numbers` of qzo/kernels/csrc/rows.h."""

    _fields_ = (
        *(("data", ctypes.c_void_p), ("kind", ctypes.c_int64)),
        *(("of_row", ctypes.c_int64), ("of_group", ctypes.c_int64)),
    )


class MovedStruct(ctypes.Structure):
    """`Moved` of qzo/kernels/csrc/moves.c."""

    _fields_ = (
        ("master", ctypes.c_void_p),
        *(("live", ctypes.c_void_p), ("live_kind", ctypes.c_int64), ("live_stride", ctypes.c_int64)),
        *(("offset", ctypes.c_void_p), ("offset_kind", ctypes.c_int64), ("offset_stride", ctypes.c_int64)),
        *(("scale_start", ctypes.c_void_p), ("offset_start", ctypes.c_void_p)),
    )


class RowsStruct(ctypes.Structure):
    """`Rows` of qzo/kernels/csrc/rows.h."""

    _fields_ = (
        *(("codes", ctypes.c_void_p), ("order", ctypes.c_int64)),
        *(("row_bytes", ctypes.c_int64), ("run_bytes", ctypes.c_int64)),
        *(("plane_bits", ctypes.c_int64), ("planes", ctypes.c_int64)),
        *(("plane_groups", ctypes.c_int64), ("codebooks", ctypes.c_void_p), ("count", ctypes.c_int64)),
        *(("size", ctypes.c_int64), ("code_bytes", ctypes.c_int64), ("first", ctypes.c_int64)),
        *(("table", ctypes.c_void_p), ("zero", ctypes.c_int64)),
        *(("scales", NumbersStruct), ("zeros", NumbersStruct), ("offsets", NumbersStruct)),
        *(("group_size", ctypes.c_int64), ("k", ctypes.c_int64), ("n", ctypes.c_int64)),
    )


def _described(codes: Codes) -> _Codes:
    words, n_bits, scales, zeros, g_idx, awq = codes
    table, zero = (zeros.data_ptr(), 0) if isinstance(zeros, Tensor) else (None, zeros)
    order = None if g_idx is None else g_idx.data_ptr()
    depth, columns = _shape(codes)
    numbers = (scales.data_ptr(), NUMBERS[scales.dtype], table, zero)
    pointers = (words.data_ptr(), words.stride(0), awq, n_bits, *numbers, order)
    groups = scales.shape[0]
    return _Codes(*pointers, groups, depth // groups, depth, columns)


def _check(failed: int, codes: Codes) -> None:
    if failed:
        raise QzoError(
            f"g_idx names a group outside 0 ... {len(codes.scales) - 1}; copy or download the checkpoint again"
        )


@cache
def library() -> Any:
    """The compiled code, or None: not built, built from older sources, or for an OpenMP runtime that is not here."""
    paths = [Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        _ = loaded.qzo_draw
        compiled = (loaded.qzo_codes_bytes(), loaded.qzo_rows_bytes(), loaded.qzo_moved_bytes())
        if compiled != tuple(ctypes.sizeof(struct) for struct in (_Codes, RowsStruct, MovedStruct)):
            return None
    except (OSError, AttributeError):
        return None
    codes, pointer, size, number = ctypes.POINTER(_Codes), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    rows = ctypes.POINTER(RowsStruct)
    product = (pointer, size, size, pointer, pointer, number)
    loaded.qzo_rebuild.argtypes = [codes, pointer, number, number]
    loaded.qzo_rebuild_by_row.argtypes = [rows, pointer, number, number]
    loaded.qzo_multiply.argtypes = [codes, *product]
    loaded.qzo_multiply_by_row.argtypes = [rows, *product]
    loaded.qzo_panel_columns.restype = size
    word = ctypes.c_uint32
    loaded.qzo_draw.argtypes = [pointer, size, size, ctypes.c_uint64, word, word, word, number, number]
    loaded.qzo_draw.restype = None
    of_move = (ctypes.POINTER(MovedStruct), pointer, ctypes.c_float, number, number, number, size, size, number)
    loaded.qzo_move.argtypes, loaded.qzo_move.restype = list(of_move), None
    return loaded


@cache
def _panel_columns() -> int:
    """Columns of Wᵀ that a thread rebuilds at a time; 0 on a CPU without the instructions."""
    return int(library().qzo_panel_columns())
