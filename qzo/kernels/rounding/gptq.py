"""GPTQ: a weight matrix quantized column by column, each error made good by the columns still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.kernels.rounding.rtn import scale_and_zero
from qzo.kernels.rounding.sizes import check_bits, resolve_group_size

BLOCK_COLUMNS = 128  # columns whose errors reach the rest of the matrix in one product
DAMPING_TRIES = 4  # each with ten times the damping of the one before


@dataclass(frozen=True)
class GptqOptions:
    """What the quantizer may choose; checked when it is made.

    Args:
        n_bits, group_size, symmetric: as in `round_to_nearest`.
        act_order: columns in the order of falling H[k, k] (`desc_act`): the weights that matter most lose least. Groups
            then are runs of that order, and g_idx is not sorted.
        static_groups: with act_order, groups of neighbouring columns and scales found before the first column is
            rounded, so that g_idx stays sorted and forward needs no lookup.
        damping: share of the mean of H's diagonal that is added to it.
    """

    n_bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_bits(self.n_bits)
        if not 0 < self.damping < 1:
            raise QzoError(f"damping={self.damping} is not between 0 and 1; choose a small share, e.g. 0.01")
        if self.static_groups and not self.act_order:
            raise QzoError("static_groups=True has no effect without act_order=True; set both or neither")


class Codes(NamedTuple):
    """codes uint8 [N, K], scales [N, K/g], zero_points uint8 [N, K/g], g_idx int32 [K] (None: k // g)."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    g_idx: Tensor | None


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, options: GptqOptions, scale_dtype: torch.dtype = torch.float16) -> Codes:
    """Quantize `weight` so that ||(W - Ŵ) X||² is small for the inputs X that the Hessian was made of.

    Column k is rounded to the grid of its group, e = (w_k - ŵ_k) / U[k, k], and every later column j changes by
    -e U[k, j], where U is the upper Cholesky factor of (H + damping)⁻¹ (Frantar et al. 2022, arXiv 2210.17323,
    Algorithm 1). The grid of a group is `round_to_nearest`'s, found when its first column is reached, with the scale
    rounded to `scale_dtype` first. An input that was always zero has nothing to make good: its weights are rounded to
    nearest, and so is the whole matrix where H is diagonal.

    Args:
        weight: [N, K] (out, in), any floating dtype and stride.
        hessian: H = X Xᵀ [K, K] fp32 (a constant factor such as 2 changes nothing), see `Hessian`.
        options: bits, groups, order, damping.
        scale_dtype: dtype of the returned scales.

    Extra memory: two fp32 matrices [K, K] and one [K, N]. Raises QzoError for unsupported sizes, weights or inputs
    that are not finite, and a Hessian that stays indefinite at a thousand times the damping.
    """
    columns = weight.shape[1]
    group_size = resolve_group_size(columns, options.group_size)
    order = _order(hessian, options)
    factor = _inverse_factor(hessian[order][:, order] if options.act_order else hessian, options.damping)
    grid = _Grid(weight, group_size, options, scale_dtype)
    codes = _round_columns(weight.t()[order].float(), factor, grid, order)
    unsorted = options.act_order and not options.static_groups
    back = torch.argsort(order)
    g_idx = (back // group_size).to(torch.int32) if unsorted else None
    return Codes(codes[back].t().contiguous(), grid.scales.t().contiguous(), grid.zeros.t().contiguous(), g_idx)


class Hessian:
    """H = Σ x xᵀ over the inputs x of a linear layer, fp32 [K, K] (the factor 2 of the paper cancels)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        """Start at zero."""
        self.matrix = torch.zeros(in_features, in_features, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the inputs [..., K] of one forward pass."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.matrix.dtype)
        self.matrix.addmm_(rows.t(), rows)


class _Grid:
    """Scale and zero point of each group, [K/g, N]; those that are static are found at once."""

    def __init__(self, weight: Tensor, group_size: int, options: GptqOptions, dtype: torch.dtype) -> None:
        rows, columns = weight.shape
        self.group_size, self.options = group_size, options
        self.scales = torch.empty(columns // group_size, rows, dtype=dtype, device=weight.device)
        self.zeros = torch.empty(columns // group_size, rows, dtype=torch.uint8, device=weight.device)
        for group in range(columns // group_size if options.static_groups else 0):
            self.find(group, weight[:, group * group_size : (group + 1) * group_size].t().float())

    def find(self, group: int, columns: Tensor) -> None:
        """Fit the grid of one group to its weights, fp32 [g, N]."""
        grouped = columns.t()[:, None]  # [N, 1, g]
        scale, zero = scale_and_zero(grouped, self.options.n_bits, self.options.symmetric, self.scales.dtype)
        self.scales[group], self.zeros[group] = scale.flatten(), zero.flatten()


def _round_columns(work: Tensor, factor: Tensor, grid: _Grid, order: Tensor) -> Tensor:
    """Round the columns, as rows of `work` [K, N], which is used up; returns codes uint8 [K, N] in the same order."""
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    size, static, top = grid.group_size, grid.options.static_groups, 2**grid.options.n_bits - 1
    groups = (order // size).tolist() if static else [k // size for k in range(len(work))]
    for start, stop in _blocks(len(work), size):
        errors = torch.empty(stop - start, work.shape[1], device=work.device)
        for k in range(start, stop):
            if not static and k % size == 0:
                grid.find(groups[k], work[k : k + size])
            scale, zero = grid.scales[groups[k]].float(), grid.zeros[groups[k]].float()
            level = (work[k] / scale).round_().add_(zero).clamp_(0, top)
            codes[k] = level
            error = (work[k] - (level - zero) * scale) / factor[k, k]
            work[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
            errors[k - start] = error
        work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return codes


def _blocks(columns: int, group_size: int) -> list[tuple[int, int]]:
    """Runs of at most BLOCK_COLUMNS columns; a group begins inside a run only if it ends there too.

    So every weight of a group carries the errors of all columns before it when the scale of the group is found.
    """
    bounds = range(0, columns, max(1, BLOCK_COLUMNS // group_size) * group_size)
    starts = [start for bound in bounds for start in range(bound, bound + group_size, BLOCK_COLUMNS)]
    return list(zip(starts, [*starts[1:], columns], strict=True))


def _order(hessian: Tensor, options: GptqOptions) -> Tensor:
    """Column numbers in the order of work."""
    if options.act_order:
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return torch.arange(len(hessian), device=hessian.device)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (H + damping * mean)⁻¹, the mean over the inputs that were not always zero."""
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise QzoError("the calibration text gives inputs that are not finite; check the model's weights")
    alive = diagonal > 0
    mean = diagonal[alive].mean() if bool(alive.any()) else torch.ones((), device=hessian.device)
    for power in range(DAMPING_TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**power * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower, out=damped), upper=True)
            if info == 0:
                return upper
    raise QzoError(
        f"the Hessian is not positive definite even with damping={damping * 10 ** (DAMPING_TRIES - 1):g}; "
        "give more calibration text"
    )
