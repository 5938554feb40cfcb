"""GPTQ on one matrix: below rounding, equal to the textbook, exact where nothing is to be gained."""

import pytest
import torch
from gptq_inputs import ORDERS, correlated

from qzo.errors import QzoError
from qzo.kernels.rounding import gptq as module
from qzo.kernels.rounding.gptq import GptqOptions, Hessian, gptq
from qzo.kernels.rounding.rtn import round_to_nearest


def hessian_of(x):
    hessian = Hessian(x.shape[1], x.device)
    hessian.add(x)
    return hessian.matrix


def dequantize(codes, scales, zero_points, g_idx=None):
    columns = codes.shape[1]
    group = torch.arange(columns) // (columns // scales.shape[1]) if g_idx is None else g_idx.long()
    return (codes.float() - zero_points.float()[:, group]) * scales.float()[:, group]


def reference(weight, hessian, n_bits, group_size, symmetric, damping=0.01):
    """The textbook: optimal brain surgeon, one column after the other, the inverse updated by elimination (fp64)."""
    work, columns = weight.double().clone(), weight.shape[1]
    inverse = torch.linalg.inv(hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(columns))
    result = torch.empty_like(work)
    for k in range(columns):
        if k % group_size == 0:
            part = work[:, k : k + group_size].float()
            _, scale, zero = (t.double() for t in round_to_nearest(part, n_bits, group_size, symmetric, torch.float16))
        level = (work[:, k : k + 1] / scale).round().add(zero).clamp(0, 2**n_bits - 1)
        result[:, k : k + 1] = (level - zero) * scale
        error = (work[:, k] - result[:, k]) / inverse[k, k]
        work[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :]
        inverse = inverse - inverse[:, k : k + 1] * inverse[k : k + 1] / inverse[k, k]
    return result


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [16, 48, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_the_error_on_new_inputs_is_below_that_of_rounding(n_bits, group_size, symmetric, order):
    weight, held_out = torch.randn(32, 96), correlated(seed=1)
    plain = dequantize(*round_to_nearest(weight, n_bits, group_size, symmetric))
    options = GptqOptions(n_bits, group_size, symmetric, **ORDERS[order])
    found = dequantize(*gptq(weight, hessian_of(correlated()), options))
    errors = [(held_out @ (weight - other).t()).pow(2).sum() for other in (plain, found)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("group_size", [8, 32, 96, 192, 384])
def test_the_blocked_algorithm_equals_the_textbook(group_size):
    weight, hessian = torch.randn(8, 384), hessian_of(correlated(1024, 384))
    found = dequantize(*gptq(weight, hessian, GptqOptions(4, group_size)))
    expected = reference(weight, hessian, 4, group_size, True).float()
    differing = ((found - expected).abs() > 1e-3).float().mean()  # a tie broken by fp32 moves all columns after it
    assert differing < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 96, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_independent_inputs_give_round_to_nearest_exactly(symmetric, group_size, dtype):
    weight = torch.randn(16, 192)
    for power in (torch.ones(192), torch.rand(192) + 0.1, torch.zeros(192)):
        found = gptq(weight, power.diag(), GptqOptions(4, group_size, symmetric), dtype)
        expected = round_to_nearest(weight, 4, group_size, symmetric, dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False)) and found.g_idx is None


def test_blocks_never_cut_the_start_of_a_group():
    for columns, group_size in ((384, 8), (384, 48), (384, 96), (384, 192), (384, 384), (576, 64)):
        bounds = module._blocks(columns, group_size)
        starts = {start for start, _ in bounds}
        assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]] and bounds[-1][1] == columns
        assert all(stop - start <= 128 for start, stop in bounds)
        for group in range(0, columns, group_size):
            assert group in starts or any(start < group and group + group_size <= stop for start, stop in bounds)


def test_act_order_groups_the_columns_by_falling_power():
    weight, x = torch.randn(8, 64), correlated(256, 64) * torch.linspace(0.1, 4, 64)[torch.randperm(64)]
    hessian = hessian_of(x)
    codes = gptq(weight, hessian, GptqOptions(4, 16, act_order=True))
    order = torch.argsort(hessian.diagonal(), descending=True)
    assert torch.equal(codes.g_idx[order], torch.arange(64, dtype=torch.int32) // 16)
    assert gptq(weight, hessian, GptqOptions(4, 16, act_order=True, static_groups=True)).g_idx is None


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_disturb_nothing():
    weight, x = torch.randn(16, 64), correlated(256, 64)
    x[:, [3, 40, 41]] = 0
    found = gptq(weight, hessian_of(x), GptqOptions(4, 64))
    alive = [k for k in range(64) if k not in (3, 40, 41)]
    scale = found.scales.float()
    assert torch.equal(found.codes[:, 3], ((weight[:, 3:4] / scale).round() + 8).clamp(0, 15).to(torch.uint8)[:, 0])
    loud = weight.clone()
    loud[:, 40] *= 0.5  # not the largest of its group
    again = gptq(loud, hessian_of(x), GptqOptions(4, 64))
    if torch.equal(again.scales, found.scales):
        assert torch.equal(again.codes[:, alive], found.codes[:, alive])


def test_codes_are_chosen_for_the_scale_that_a_checkpoint_stores():
    weight, hessian = torch.randn(16, 64), hessian_of(correlated(256, 64))
    found = gptq(weight, hessian, GptqOptions(8, 64), torch.float16)
    exact = gptq(weight, hessian, GptqOptions(8, 64), torch.float32)
    assert found.scales.dtype == torch.float16 and torch.equal(found.scales, exact.scales.half())
    first = (weight[:, 0] / found.scales[:, 0].float()).round() + 128
    assert torch.equal(found.codes[:, 0], first.clamp(0, 255).to(torch.uint8))


def test_more_damping_is_tried_before_giving_up():
    weight = torch.randn(4, 16)
    x = torch.randn(8, 16)  # of rank 8
    assert torch.isfinite(dequantize(*gptq(weight, hessian_of(x), GptqOptions(4, 16, damping=1e-9)))).all()
    indefinite = torch.full((16, 16), -100.0) + torch.eye(16) * 101
    with pytest.raises(QzoError, match=r"not positive definite even with damping=10; give more calibration text"):
        gptq(weight, indefinite, GptqOptions(4, 16))
    with pytest.raises(QzoError, match="not finite"):
        gptq(weight, hessian_of(x * float("inf")), GptqOptions(4, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": 1.0}, "damping=1.0"),
        ({"n_bits": 5}, "n_bits=5"),
        ({"static_groups": True}, "static_groups=True has no effect"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(QzoError, match=message):
        GptqOptions(**options)
