"""Packed layers on an NVIDIA GPU by kernels in Triton (qzo/kernels/triton), where these are asked for.

Otherwise, and for what they do not take, PyTorch's operators do the work (qzo/kernels/asked.py). A product of few rows
is computed from the codes, and the weight never exists; for more rows it is rebuilt in one launch, as whole as
REBUILT_ELEMENTS allow, for cuBLAS to multiply with. Weights have the bits of the operators, in Triton's interpreter and
on an H100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qzo.kernels import asked
from qzo.kernels.packed import BLOCKS, INTERLEAVED, PAIRS, WORDS, Packed
from qzo.kernels.philox import Stream
from qzo.kernels.rebuilt import keeps_weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELEMENTS = 2**31  # of a weight: kernels count in int32
# Weights that are rebuilt at a time, 128 MiB in 16 bits: every layer of a 7B model at once, the largest of a 13B model
# in two parts. A multiple of 64 rows, so that each part begins where a word of codes does.
REBUILT_ELEMENTS, REBUILT_ROWS = 2**26, 64
# Rows of x up to which a product is computed from the codes, by (layout, n_bits); none of others, whose rebuilt weight
# is faster for any number (`make gpu`, part "kernels", on an H100). Of these it is so above some 40 rows, but a step of
# a 7B model waits for launches up to 128, of which codes need half: there it takes a fifth less.
TOKENS: dict[tuple[int, int], int] = {(WORDS, 2): 128, (WORDS, 4): 128, (WORDS, 8): 128, (INTERLEAVED, 4): 128}
_most: int | None = None


def product(x: Tensor, describe: Callable[[], Packed | None], *trained: Tensor) -> Tensor | None:
    """`multiply` for a layer that `describe` describes, with `trained` in it; None where the kernels do not take it."""
    packed = None if keeps_weights() or not asked.takes(x, x, *trained) else describe()
    return multiply(packed, x) if packed is not None and can_multiply(packed, x) else None


def can_multiply(packed: Packed, x: Tensor) -> bool:
    """Whether the kernels are made for such codes and such an x."""
    columns, depth = packed.shape
    whole = [tensor for tensor in (packed.codes, packed.zeros, packed.order) if isinstance(tensor, Tensor)]
    return (
        x.dtype in DTYPES
        and packed.scales.dtype in DTYPES
        and x.shape[-1] == depth
        and columns * depth < ELEMENTS
        and all(tensor.is_contiguous() for tensor in whole)
        and (packed.layout == BLOCKS or packed.scales.is_contiguous())
        and not (packed.layout == PAIRS and depth % 2)
    )


def rebuild(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start:stop of W [stop - start, K] in one launch, computed in fp32 and rounded once to `dtype`.

    As the operators have it, to the bit, and contiguous as codes lie: W is with BLOCKS and PAIRS, Wᵀ with the others.
    With INTERLEAVED `start` is a multiple of 8. No memory but the result.
    """
    rows, depth = stop - start, packed.shape[1]
    if packed.layout in (BLOCKS, PAIRS):
        weight = packed.codes.new_empty(rows, depth, dtype=dtype)
    else:
        weight = packed.codes.new_empty(depth, rows, dtype=dtype).t()
    if not weight.is_meta:
        asked.kernels("launch").rebuild(weight, packed, start)
    return weight


def multiply(packed: Packed, x: Tensor) -> Tensor:
    """y = x Wᵀ, x [..., K] -> [..., N], with W rounded to the dtype of x and sums in fp32.

    Extra memory: none for few rows of x; for more than `most_tokens` a part of the weight in the dtype of x, see
    REBUILT_ELEMENTS.
    """
    columns, depth = packed.shape
    rows = x.reshape(-1, depth)
    if len(rows) > most_tokens(packed):
        if columns * depth <= REBUILT_ELEMENTS:
            return torch.mm(rows, rebuild(packed, 0, columns, x.dtype).t()).view(*x.shape[:-1], columns)
        y = x.new_empty(*x.shape[:-1], columns)
        flat = y.view(-1, columns)
        for start, stop in rebuilt_bounds(packed.shape):
            weight = rebuild(packed, start, stop, x.dtype)
            torch.mm(rows, weight.t(), out=flat[:, start:stop])
            del weight  # before the next part is born
        return y
    y = x.new_empty(*x.shape[:-1], columns)
    if not y.is_meta:
        asked.kernels("launch").multiply(y.view(-1, columns), packed, rows)
    return y


def multiply_both(
    packed: Packed,
    sides: tuple[Tensor, Tensor],
    masters: Tensor,
    stream: Stream,
    eps: float,
    distribution: str,
    relative: bool = False,
    starts: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """y± = x± W±ᵀ in one launch and one pass over the codes; W± has the scales s ± eps z, which are nowhere stored.

    To the bit a product, computed from the codes, of x+ with the scales that a perturbation by + eps leaves behind, and
    of x- with those by - eps: s ± eps z (with `relative` s ± eps z s) in fp32, rounded to the dtype of the live scales.
    (Where a product adds up as many columns at a time, which is by tiles of this depth.)

    Args:
        packed: for which `can_multiply` is true; of its scales and offsets only dtypes and strides are taken, and the
            offsets where none follow.
        sides: x+ and x-, [..., K], of one shape and dtype, for which no derivative is wanted.
        masters: s, fp32 in the shape of the scales, contiguous.
        stream, distribution: of z, see `qzo.kernels.philox`; elements are counted as the scales are numbered.
        starts: s0 and m0, fp32 as `masters`, of offsets that follow their scales (qzo/optim/offsets.py), or None.

    No memory but the results.
    """
    columns, depth = packed.shape
    y_plus, y_minus = (x.new_empty(*x.shape[:-1], columns) for x in sides)
    if not y_plus.is_meta:
        flat = y_plus.view(-1, columns), y_minus.view(-1, columns)
        rows = sides[0].reshape(-1, depth), sides[1].reshape(-1, depth)
        asked.kernels("both").multiply_both(flat, packed, rows, masters, stream, eps, distribution, relative, starts)
    return y_plus, y_minus


@contextmanager
def most_tokens_of(rows: int) -> Iterator[None]:
    """Within, a product of up to so many rows of x is computed from the codes, to compare it with a rebuilt weight."""
    global _most
    before, _most = _most, rows
    try:
        yield
    finally:
        _most = before


def most_tokens(packed: Packed) -> int:
    """Rows of x up to which a product is computed from the codes."""
    if _most is not None:
        return _most
    return TOKENS.get((packed.layout, packed.n_bits), 0) if packed.order is None else 0


def rebuilt_bounds(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows start:stop of the parts in which a weight [N, K] is rebuilt: equal ones, but for a shorter last."""
    rows, depth = shape
    parts = max(1, -(-rows * depth // REBUILT_ELEMENTS))
    step = -(-rows // parts // REBUILT_ROWS) * REBUILT_ROWS
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
