"""Weights from packed codes on a CPU by compiled code (qzo/rebuild.c), where installing the package found a compiler.

PyTorch's operators come to the same numbers, bit for bit, in five passes over the weights; compiled, it is one. The
passes of a QZO step over a small model spend a tenth of their time on them otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.forward_ad import unpack_dual

from qzo.errors import QzoError

DTYPES = (torch.bfloat16, torch.float32)
_allowed = True


def is_compiled() -> bool:
    """Whether there is compiled code here, and it can be loaded."""
    return _kernel() is not None


@contextmanager
def by_operators() -> Iterator[None]:
    """Within, weights are rebuilt as where there is no compiled code, to compare one with the other."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def can_rebuild(words: Tensor, n_bits: int, scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether `rebuild` takes these; it computes no derivatives, backward or forward, and cannot be traced."""
    return (
        _allowed
        and not torch.compiler.is_compiling()
        and words.device.type == "cpu"
        and dtype in DTYPES
        and 32 % n_bits == 0
        and not scales.requires_grad
        and is_compiled()
        and unpack_dual(scales).tangent is None
    )


def rebuild(
    words: Tensor,
    n_bits: int,
    scales: Tensor,
    zeros: Tensor | int,
    g_idx: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Wᵀ[k, n] = (codes[k, n] - zeros[g_idx[k], n]) * scales[g_idx[k], n], computed in fp32 and rounded to `dtype`.

    Args:
        words: int32 [K * n_bits / 32, N], packed as in qzo/packing.py.
        scales: [K / g, N], of any floating point dtype.
        zeros: int32 [K / g, N], or the one zero point of all.
        g_idx: int32 [K], or None for k // g.
        dtype: bf16 or fp32.

    Returns:
        [K, N]. Extra memory: `scales` in fp32. Fake tensors give a fake one.

    Raises:
        QzoError: g_idx names a group that does not exist.
    """
    words, scales = _rows_in_order(words), scales.float().contiguous()
    columns = words.shape[1]
    out = torch.empty(words.shape[0] * (32 // n_bits), columns, dtype=dtype, device=words.device)
    of_groups, of_all = (zeros.contiguous(), 0) if isinstance(zeros, Tensor) else (None, zeros)
    if isinstance(words, FakeTensor):
        return out
    kernel = _kernel()
    if kernel is None:
        raise QzoError("there is no compiled code here; ask `can_rebuild` first")
    failed = kernel(
        words.data_ptr(),
        words.stride(0),
        n_bits,
        scales.data_ptr(),
        None if of_groups is None else of_groups.data_ptr(),
        of_all,
        None if g_idx is None else g_idx.data_ptr(),
        scales.shape[0],
        out.data_ptr(),
        dtype == torch.bfloat16,
        out.shape[0],
        columns,
        torch.get_num_threads(),
    )
    if failed:
        raise QzoError(f"g_idx names a group outside 0 ... {scales.shape[0] - 1}")
    return out


def _rows_in_order(words: Tensor) -> Tensor:
    return words if words.stride(1) == 1 else words.contiguous()


@cache
def _kernel() -> Callable[..., int] | None:
    """The compiled function, or None: not built, or built for an OpenMP runtime that this PyTorch does not bring."""
    paths = [Path(__file__).with_name(f"_rebuild{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        return None
    try:
        function = ctypes.CDLL(str(path)).qzo_rebuild
    except (OSError, AttributeError):
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = [
        *(pointer, size, number),  # words, their stride, n_bits
        *(pointer, pointer, ctypes.c_int32, pointer, size),  # scales, zeros, zero, g_idx, groups
        *(pointer, number, size, size, number),  # out, is_bf16, K, N, threads
    ]
    function.restype = number
    result: Callable[..., int] = function
    return result
