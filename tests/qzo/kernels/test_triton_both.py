"""z in a kernel, and both sides of a step in one pass over the codes, against what draws, perturbs and multiplies."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from packed_layers import FORMATS, gguf, gptq, nf4
from triton_kernels import kernels, on_the_cpu

from qzo import QZO
from qzo.kernels import fused
from qzo.kernels.philox import BITS, Stream, draw, draw_by_operators
from qzo.optim import offsets

STREAM = Stream(2**63 + 12_345, 7, 2**31 + 5, 1)  # numbers whose highest bits are set
EPS = 1e-3
ODD = {
    "groups of no power of two": lambda: gptq((32, 144), group_size=48, symmetric=False),
    "a last group that is shorter": lambda: gptq((32, 80), group_size=32, short_group=True),
    "a group longer than a tile": lambda: gptq((32, 256), group_size=128),
    "fp32 scales": lambda: gptq((32, 64), dtype=torch.float32),
    "blocks across rows": lambda: nf4((17, 98)),
}  # fmt: skip


@pytest.mark.parametrize("distribution", BITS)
@pytest.mark.parametrize(("start", "count"), [(0, 3000), (2040, 17), (127, 1)])
def test_z_has_the_bits_of_the_reference(distribution, start, count):
    ours, theirs = torch.empty(count), torch.empty(count)
    kernels("both", True).draw(ours, start, STREAM, distribution)
    draw_by_operators(theirs, start, STREAM, distribution)
    assert torch.equal(ours, theirs)
    again = torch.empty(count)
    with on_the_cpu():
        draw(again, start, STREAM, distribution)
    assert torch.equal(again, theirs)


def test_a_step_along_z_of_the_kernel_is_that_along_z_of_compiled_code():
    moved = []
    for carrier in (nullcontext, on_the_cpu):
        live = {"a": torch.full((700,), 0.01)}
        optimizer = QZO(live, lr=1e-4, noise="philox", directions=2)
        with carrier():
            optimizer.step(lambda: (live["a"] - 0.02).square().sum())  # noqa: B023
        moved.append(live["a"])
    assert torch.equal(*moved)


def perturbed(layer, masters, sign, distribution, relative, starts=None):
    """Write what QZO writes to the live scales, and to offsets that follow them."""
    z = torch.empty(masters.numel())
    draw_by_operators(z, 0, STREAM, distribution)
    moved = z.mul_(sign * EPS).view(masters.shape)
    scale = (moved.mul_(masters) if relative else moved).add_(masters)
    layer.scales.copy_(scale)
    if starts is not None:
        state = dict(zip(offsets.OFFSET_STATE, starts, strict=True))
        layer.offsets.copy_(offsets.following(state, scale.flatten()).view(scale.shape))


def assert_both_are_two_products(layer, distribution="binomial", relative=False, starts=None):
    sides = torch.randn(2, 3, layer.in_features).half().unbind(0)
    masters = torch.empty(layer.scales.shape).copy_(layer.scales)
    first = None if getattr(layer, "offsets", None) is None else layer.offsets.clone()
    expected = []
    depth = kernels("both", True).DEPTH
    with on_the_cpu(), fused.most_tokens_of(3), mock.patch.object(kernels("launch", True), "DEPTH", depth):
        for sign, x in zip((1, -1), sides, strict=True):
            perturbed(layer, masters, sign, distribution, relative, starts)
            expected.append(layer(x))
        if first is not None:
            layer.offsets.copy_(first)
        layer.scales.fill_(torch.nan)  # are not read
        both = fused.multiply_both(
            layer.packed(), sides, masters, STREAM, EPS, distribution, relative=relative, starts=starts
        )
    assert not torch.equal(*expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(both, expected, strict=True))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_are_to_the_bit_two_products_with_perturbed_scales(name, relative):
    assert_both_are_two_products(FORMATS[name]((96, 160)), relative=relative)


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name):
    assert_both_are_two_products(ODD[name](), "rademacher")


def test_offsets_follow_their_scales():
    layer = gguf((17, 64), "Q4_1")
    starts = torch.randn(layer.scales.shape), torch.randn(layer.scales.shape)
    starts[0][0, 0] = 0  # where the offset stays what it was
    assert_both_are_two_products(layer, relative=True, starts=starts)
