"""Kernels in Triton on a GPU: weights of the bits that operators give there, products and z. Run by `make gpu`."""

from unittest import mock

import pytest
import torch
from moved_scales import OPTIONS, assert_same, trained
from packed_layers import FORMATS

from qzo.kernels import asked, fused
from qzo.kernels.philox import BITS, Stream, draw, draw_by_operators

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-5}
SHAPE = 96, 160
STREAM, EPS = Stream(2**63 + 12_345, 7, 2**31 + 5, 1), 1e-3
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def assert_close(found, expected):
    far = (found.double() - expected.double()).norm() / expected.double().norm()
    assert found.dtype == expected.dtype and far < TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_layers_compute_what_operators_compute(name, dtype):
    layer = FORMATS[name](SHAPE).to(DEVICE)
    with asked.by_triton():
        packed = layer.packed()
        assert torch.equal(fused.rebuild(packed, 0, 96, dtype), layer.dequantize(dtype))
        for rows in (1, 17, 64, 65):
            x = torch.randn(rows, 160, device=DEVICE).to(dtype)
            with asked.by_triton(False):
                expected = layer(x)
            for most in (0, rows):  # by a rebuilt weight, and by the codes
                with fused.most_tokens_of(most):
                    assert_close(layer(x), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_are_to_the_bit_two_products(name):
    layer = FORMATS[name](SHAPE).to(DEVICE)
    dtype = DTYPES[0]
    masters = torch.empty(layer.scales.shape, device=DEVICE).copy_(layer.scales)
    z = torch.empty(masters.numel(), device=DEVICE)
    draw_by_operators(z, 0, STREAM, "binomial")
    sides = torch.randn(2, 5, 160, device=DEVICE).to(dtype).unbind(0)
    launch, depth = asked.kernels("launch"), asked.kernels("both").DEPTH
    with asked.by_triton(), fused.most_tokens_of(5), mock.patch.object(launch, "DEPTH", depth):
        both = fused.multiply_both(layer.packed(), sides, masters, STREAM, EPS, "binomial")
        for sign, x, found in zip((1, -1), sides, both, strict=True):
            layer.scales.copy_((z * (sign * EPS)).view(masters.shape) + masters)
            assert torch.equal(layer(x), found)


@pytest.mark.parametrize("distribution", BITS)
def test_z_has_the_bits_of_the_reference(distribution):
    ours, theirs = torch.empty(5000, device=DEVICE), torch.empty(5000)
    with asked.by_triton():
        draw(ours, 2040, STREAM, distribution)
    draw_by_operators(theirs, 2040, STREAM, distribution)
    assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("with_offsets", [False, True], ids=["alone", "with offsets"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scales_are_moved_as_operators_move_them_to_the_bit(options, dtype, with_offsets):
    carriers = asked.by_triton(False), asked.by_triton()
    assert_same([trained(carrier, dtype, with_offsets, DEVICE, **options) for carrier in carriers])
