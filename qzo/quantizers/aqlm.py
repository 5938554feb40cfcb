"""AQLM codes and codebooks for a weight, without data: k-means on its groups, codebook after codebook.

The `aqlm` project finds codes by beam search against calibration inputs and fine-tunes codebooks through whole blocks,
for hours on a GPU. This one sees the weights alone and takes about a second a layer of half a million weights: for
tests, and for what a format costs. It does not save a small model at two bits: for SmolLM2-135M the loss of a sentence
rises from 3.5 to 19 with 2x8 by eights, and to 4.5 with 2x8 by fours, four bits. 1x16 takes minutes a layer where there
are more groups than entries.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qzo.formats.aqlm.layer import AqlmLayout, AqlmLinear
from qzo.formats.layer import Device, frozen
from qzo.models.walk import LinearShape, candidates, freeze, replace_sites
from qzo.optim.noise import mix_seed
from qzo.quantizers.selection import Selection, of_towers, select_held

ITERATIONS = 8  # of k-means on the residual, a codebook
ROUNDS = 4  # of fitting each codebook anew to what the others leave
SAMPLE = 64  # groups to a centroid that k-means looks at
BLOCK = 2**22  # distances at a time


def quantize_aqlm(model: nn.Module, layout: AqlmLayout | None = None, seed: int = 0) -> nn.Module:
    """Replace the layers that `qzo.quantize` would by AqlmLinear, in place; returns the model, frozen.

    2x8 by eights without `layout`. A layer that it cannot hold stays in 16 bits. Raises QzoError, with the layer's
    name, before the first layer is replaced.
    """
    layout = layout or AqlmLayout(2, 8)
    held = _held(model, layout)
    replace_sites(
        model, held.sites, lambda index, weight, bias: from_weight(weight, bias, layout, mix_seed(seed, index))
    )
    return freeze(model)


def _held(model: nn.Module, layout: AqlmLayout) -> Selection:
    """The layers that are replaced, of a multimodal model those of the text part; what is left is told."""
    sites = candidates(model)
    beside = of_towers(model, sites)
    held = select_held([site for site in sites if site.paths[0] not in beside], layout.check)
    held = Selection(held.sites, {**beside, **held.left})
    held.tell()
    return held


@torch.no_grad()
def from_weight(
    weight: Tensor, bias: Tensor | None = None, layout: AqlmLayout | None = None, seed: int = 0
) -> AqlmLinear:
    """Quantize `weight` [N, K]; 2x8 by eights without `layout`; a weight on `meta` gives `empty`.

    Rows of groups are brought to length 1 a weight on the average; that is their scale. Then each codebook in turn is
    fitted to what those before it leave over, all of them are fitted anew in turn, and at last each scale is the one
    that leaves the smallest error. Codebooks and scales get the weight's dtype. Where there are no more groups than a
    codebook has entries, nothing but rounding is lost. The same seed gives the same codes on the same machine.

    Extra memory: four fp32 copies of the weight. Raises QzoError for sizes that are no whole number of groups.
    """
    layout = layout or AqlmLayout(2, 8)
    rows, columns = weight.shape
    layout.check(LinearShape(columns, rows))
    layer = AqlmLinear.empty(columns, rows, layout, False, weight.dtype, weight.device)
    layer.bias = frozen(bias)
    if weight.is_meta:
        return layer
    grouped = _groups(weight.float(), layout)  # [N/og, K/ig, og ig]
    scale = grouped.square().mean((1, 2)).sqrt().clamp(min=1e-12)
    vectors = (grouped / scale[:, None, None]).flatten(0, 1)
    codes, codebooks = _fit(vectors, layout, torch.Generator(weight.device).manual_seed(mix_seed(seed)))
    books = codebooks.to(weight.dtype)
    sums = _sums(codes, books.float()).view_as(grouped)
    fitted = (grouped * sums).sum((1, 2)) / sums.square().sum((1, 2)).clamp(min=1e-12)
    layer.scales.copy_(fitted.clamp(min=0).view_as(layer.scales))
    layer.codebooks.copy_(books.view_as(layer.codebooks))
    half = 2 ** (layer.codes.element_size() * 8 - 1)  # the bit pattern of an unsigned number
    layer.codes.copy_((codes + half).remainder(2 * half).sub(half).view_as(layer.codes))
    return layer


def _groups(weight: Tensor, layout: AqlmLayout) -> Tensor:
    """[N, K] -> [N/og, K/ig, og * ig]."""
    og, ig = layout.out_group_size, layout.in_group_size
    return weight.unflatten(0, (-1, og)).unflatten(2, (-1, ig)).transpose(1, 2).flatten(2)


def _fit(vectors: Tensor, layout: AqlmLayout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes int64 [M, C] and codebooks [C, 2^b, D] for vectors [M, D]."""
    count, size = layout.num_codebooks, 2**layout.nbits_per_codebook
    whole = vectors.new_zeros(count, size, vectors.shape[1])
    codebooks = whole[:, : len(vectors)]  # more entries than vectors are of no use
    codes = torch.zeros(len(vectors), count, dtype=torch.int64, device=vectors.device)
    left = vectors.clone()
    for number in range(count):
        codebooks[number] = _centroids(left, codebooks.shape[1], generator)
        codes[:, number] = _nearest(left, codebooks[number])
        left -= codebooks[number][codes[:, number]]
    for number in list(range(count)) * (ROUNDS if count > 1 else 1):
        target = left.add_(codebooks[number][codes[:, number]])
        codes[:, number] = _nearest(target, codebooks[number])
        codebooks[number] = _means(target, codes[:, number], codebooks[number])
        left = target - codebooks[number][codes[:, number]]
    return codes, whole


def _centroids(vectors: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means [size, D] of a sample; the vectors themselves where they are as many as the centroids."""
    if len(vectors) == size:
        return vectors
    order = torch.randperm(len(vectors), generator=generator, device=vectors.device)
    sample = vectors[order[: SAMPLE * size]]
    centroids = sample[:size].clone()
    for _ in range(ITERATIONS):
        centroids = _means(sample, _nearest(sample, centroids), centroids)
    return centroids


def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Index [M] of the nearest centroid: argmin |c|² - 2 x c."""
    norms = centroids.square().sum(1)
    step = max(1, BLOCK // len(centroids))
    return torch.cat([torch.addmm(norms, part, centroids.t(), alpha=-2).argmin(1) for part in vectors.split(step)])


def _means(vectors: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """The mean of the vectors of each code; a centroid without vectors stays where it is."""
    sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)
    counts = torch.bincount(codes, minlength=len(centroids))[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


def _sums(codes: Tensor, codebooks: Tensor) -> Tensor:
    """What the codes [M, C] stand for, [M, D]."""
    return torch.stack([table[codes[:, number]] for number, table in enumerate(codebooks)]).sum(0)


def quantize_random(model: nn.Module, seed: int = 0) -> nn.Module:
    """Replace the layers that `qzo.quantize` would by AqlmLinear with random codes, in place; returns the model.

    Each layer keeps the standard deviation of its weight (0.02 on `meta`), its bias, dtype and device. What remains
    is frozen, with layers that 1x16 cannot hold. Raises QzoError before the first layer is replaced.
    """
    held = _held(model, AqlmLayout())
    replace_sites(model, held.sites, partial(_random_like, seed))
    return freeze(model)


def _random_like(seed: int, index: int, weight: Tensor, bias: Tensor | None) -> AqlmLinear:
    std = 0.02 if weight.is_meta else float(weight.float().std())
    rows, columns = weight.shape
    return random_layer(columns, rows, mix_seed(seed, index), std, bias, weight.dtype, weight.device)


def random_layer(
    in_features: int,
    out_features: int,
    seed: int = 0,
    std: float = 0.02,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
) -> AqlmLinear:
    """A 1x16 layer whose W has standard deviation `std`: uniform codes, normal codebook; global RNG untouched.

    For measuring memory and time, not accuracy.
    """
    layer = AqlmLinear.empty(in_features, out_features, None, False, dtype, device)
    layer.bias = frozen(bias)
    layer.scales.fill_(std)
    if not layer.codes.is_meta:
        generator = torch.Generator(device=layer.codes.device).manual_seed(mix_seed(seed))
        layer.codes.random_(-(2**15), 2**15, generator=generator)
        layer.codebooks.normal_(generator=generator)
    return layer
