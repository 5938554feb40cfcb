"""Group-wise round-to-nearest quantization of a weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.kernels.rounding.sizes import check_bits, resolve_group_size

CHUNK_ELEMENTS = 2**22  # weights that are held in fp32 at a time: 16 MiB


@torch.no_grad()
def round_to_nearest(
    weight: Tensor,
    n_bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize `weight` so that weight ≈ (codes - zero_points) * scales, group by group along K.

    Symmetric: zero = 2^(b-1) and scale = 2 max|w| / (2^b - 1), so that every weight lies within half a step of a
    code. Asymmetric: scale = (max - min) / (2^b - 1) with 0 inside [min, max], zero = round(-min / scale). The scale
    is rounded to `scale_dtype` first and the codes are chosen for the rounded one.

    Args:
        weight: [N, K] (out, in), any floating dtype and stride.
        n_bits: b, one of 2, 3, 4, 8.
        group_size: g weights along K that share a scale, a divisor of K; -1 is the whole row.
        symmetric: one zero point for all groups, or one for each.
        scale_dtype: dtype of the returned scales.

    Returns codes uint8 [N, K], scales [N, K // g], zero_points uint8 [N, K // g]. Extra memory: three fp32 copies of
    CHUNK_ELEMENTS weights. Raises QzoError for unsupported sizes and for weights that are not finite.
    """
    check_bits(n_bits)
    rows, columns = weight.shape
    group_size = resolve_group_size(columns, group_size)
    groups = columns // group_size
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, groups, dtype=scale_dtype, device=weight.device)
    zero_points = torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        grouped = weight[part].float().reshape(-1, groups, group_size)
        scale, zero = scale_and_zero(grouped, n_bits, symmetric, scale_dtype)
        levels = (grouped / scale.float()).round_().add_(zero).clamp_(0, 2**n_bits - 1)
        codes[part] = levels.view(-1, columns)
        scales[part], zero_points[part] = scale.squeeze(-1), zero.squeeze(-1)
    return codes, scales, zero_points


def scale_and_zero(grouped: Tensor, n_bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale in `dtype` and zero point in fp32, both [N, K/g, 1], of weights fp32 [N, K/g, g].

    A group of zeros gets the smallest scale. Raises QzoError where a scale is not finite.
    """
    top = 2**n_bits - 1
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    if symmetric:
        spread = torch.maximum(high.abs(), low.abs()) * 2
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        spread = high - low
    # by a tensor: by a plain number CUDA multiplies with the reciprocal, whose last bit differs from a CPU's quotient
    scale = (spread / spread.new_full((), top)).to(dtype).clamp_(min=smallest)
    if not bool(torch.isfinite(scale).all()):
        raise QzoError(
            f"the weight has values that are not finite, or too large for {dtype} scales; load the model in bfloat16 "
            "or float32, or copy its files again"
        )
    if symmetric:
        return scale, torch.full_like(spread, 2 ** (n_bits - 1))
    return scale, (-low / scale.float()).round_().clamp_(0, top)
