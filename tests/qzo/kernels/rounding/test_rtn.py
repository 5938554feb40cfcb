"""Round-to-nearest: errors within half a step, every code in use, clear refusals."""

import pytest
import torch

from qzo.errors import QzoError
from qzo.kernels.rounding import rtn
from qzo.kernels.rounding.rtn import round_to_nearest


def dequantize(codes, scales, zeros):
    size = codes.shape[1] // scales.shape[1]
    scale, zero = scales.float().repeat_interleave(size, 1), zeros.float().repeat_interleave(size, 1)
    return (codes.float() - zero) * scale, scale


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [8, 48, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_is_within_half_a_step(n_bits, group_size, symmetric):
    weight = torch.randn(16, 96)
    codes, scales, zeros = round_to_nearest(weight, n_bits, group_size, symmetric, torch.float32)
    value, scale = dequantize(codes, scales, zeros)
    assert codes.max() == 2**n_bits - 1 and scales.shape == (16, 96 // (96 if group_size == -1 else group_size))
    slack = 0.5 if symmetric else 1.0  # the rounded zero point moves an asymmetric grid by half a step more
    assert ((weight - value).abs() <= slack * scale * (1 + 1e-4)).all()


def test_symmetric_zero_point_is_the_middle_and_zero_weights_stay_zero():
    weight = torch.randn(4, 32)
    weight[1] = 0
    codes, scales, zeros = round_to_nearest(weight, 4, 16)
    assert (zeros == 8).all() and (scales > 0).all() and scales.dtype == torch.float16
    assert (dequantize(codes, scales, zeros)[0][1] == 0).all()


def test_codes_are_chosen_for_the_rounded_scale():
    weight = torch.randn(8, 64)
    codes, scales, zeros = round_to_nearest(weight, 8, 64)
    expected = (weight / scales.float() + zeros.float()).round().clamp(0, 255)
    assert torch.equal(codes.float(), expected)


def test_row_chunks_do_not_change_the_result(monkeypatch):
    weight = torch.randn(40, 64).bfloat16()
    whole = round_to_nearest(weight, 4, 32)
    monkeypatch.setattr(rtn, "CHUNK_ELEMENTS", 3 * 64)
    assert all(torch.equal(a, b) for a, b in zip(whole, round_to_nearest(weight, 4, 32), strict=True))


def test_transposed_weights_are_quantized_as_they_read():
    weight = torch.randn(32, 16)
    assert torch.equal(round_to_nearest(weight.t(), 4, 16)[0], round_to_nearest(weight.t().contiguous(), 4, 16)[0])


def test_group_size_that_does_not_divide_names_the_nearest_that_does():
    with pytest.raises(QzoError, match="in_features=100 is not divisible by group_size=64; choose 50"):
        round_to_nearest(torch.randn(8, 100), 4, 64)
    round_to_nearest(torch.randn(8, 100), 4, 50)


@pytest.mark.parametrize(("n_bits", "group_size"), [(5, 32), (16, 32), (4, 0), (4, -2)])
def test_unsupported_sizes_are_refused(n_bits, group_size):
    with pytest.raises(QzoError):
        round_to_nearest(torch.randn(8, 64), n_bits, group_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e7])
def test_weights_that_fp16_scales_cannot_hold_are_refused(value):
    weight = torch.randn(8, 64)
    weight[3, 5] = value
    with pytest.raises(QzoError, match="not finite, or too large"):
        round_to_nearest(weight, 4, 64)
