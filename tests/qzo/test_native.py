"""Compiled rebuilding of weights against PyTorch's operators: the same bits, or left to them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from qzo import native
from qzo.errors import QzoError
from qzo.linear import QuantLinear

compiled = pytest.mark.skipif(not native.is_compiled(), reason="the package was installed without a compiler")
DTYPES = [torch.bfloat16, torch.float32]


def made(n_bits=4, group_size=32, symmetric=True, act_order=False, shape=(96, 64), dtype=torch.bfloat16):
    layer = QuantLinear.from_weight(torch.randn(shape, dtype=dtype), None, n_bits, group_size, symmetric)
    if act_order:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(layer.in_features)])
        layer.read_layout()
    return layer


def by_operators(layer, *rows, dtype):
    with native.by_operators():
        assert not native.can_rebuild(layer.qweight, layer.n_bits, layer.scales, dtype)
        return layer._rows(*rows, dtype, layer.scales)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    bits = torch.int16 if ours.dtype == torch.bfloat16 else torch.int32
    numbers = ~theirs.isnan()
    assert torch.equal(ours.isnan(), ~numbers)
    assert torch.equal(ours.view(bits)[numbers], theirs.view(bits)[numbers])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [(0, 96), (20, 53)])
def test_the_same_bits_as_operators(dtype, n_bits, symmetric, act_order, rows):
    layer = made(n_bits, 32, symmetric, act_order)
    assert native.can_rebuild(layer.qweight, n_bits, layer.scales, dtype)
    assert_same_bits(layer._rows(*rows, dtype, layer.scales), by_operators(layer, *rows, dtype=dtype))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_scales_of_every_kind(dtype, threads):
    """Any 32 bits that a scale may be made of: subnormal, negative, infinite and NaN, which must stay NaN."""
    layer = made(group_size=16, symmetric=False, shape=(1024, 128), dtype=torch.float32)  # enough for three threads
    layer.scales.view(torch.int32).random_(-(2**31), 2**31 - 1)
    layer.scales.view(torch.int32)[0, :4] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F7FFFFF], dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = layer._rows(0, 1024, dtype, layer.scales)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(ours, by_operators(layer, 0, 1024, dtype=dtype))


def test_a_layer_answers_without_compiled_code(monkeypatch):
    layer, x = made(), torch.randn(3, 64).bfloat16()
    expected = layer(x)
    monkeypatch.setattr(native, "_kernel", lambda: None)
    assert not native.is_compiled() and torch.equal(layer(x), expected)
    with pytest.raises(QzoError, match="no compiled code"):
        native.rebuild(layer.qweight, 4, layer.scales, 8, None, torch.float32)


def test_a_library_that_cannot_be_loaded_counts_as_none(monkeypatch, tmp_path):
    (tmp_path / "_rebuild.so").write_text("no library")
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".so"])
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._kernel.__wrapped__() is None


def test_what_it_does_not_do_is_left_to_operators():
    words, scales = made().qweight, made().scales.float()
    assert native.can_rebuild(words, 4, scales, torch.float32) == native.is_compiled()
    assert not native.can_rebuild(words, 3, scales, torch.float32)
    assert not native.can_rebuild(words, 4, scales, torch.float16)
    assert not native.can_rebuild(words.to("meta"), 4, scales.to("meta"), torch.float32)
    assert not native.can_rebuild(words, 4, scales.clone().requires_grad_(), torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scales, torch.ones_like(scales))
        assert not native.can_rebuild(words, 4, dual, torch.float32)


def test_a_tangent_of_the_scales_reaches_the_weights():
    layer = made(dtype=torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(layer.scales, layer.scales)
        value, tangent = forward_ad.unpack_dual(layer._rows(0, 96, torch.float32, dual))
    assert torch.equal(tangent, value)  # weights are linear in the scales


def test_compiled_models_are_traced_through_operators():
    layer, x = made(dtype=torch.float32), torch.randn(3, 64)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), layer(x), rtol=1e-5, atol=1e-5)


@compiled
def test_fake_tensors_give_a_fake_weight():
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        layer = QuantLinear.empty(64, 96, group_size=32)
        layer.zero = 8
        weight = layer._rows(0, 96, torch.bfloat16, layer.scales)
    assert weight.fake_mode is mode and weight.shape == (96, 64) and weight.stride() == (1, 96)


@compiled
@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1])
def test_a_group_that_does_not_exist_is_refused(group):
    layer = made(act_order=True)
    layer.g_idx[5] = group
    with pytest.raises(QzoError, match=r"outside 0 \.\.\. 1"):
        layer.dequantize()


@compiled
def test_tensors_may_be_transposed_views():
    layer = made()
    expected = layer.dequantize()
    layer.qweight, layer.scales = layer.qweight.t().contiguous().t(), layer.scales.t().contiguous().t()
    assert torch.equal(layer.dequantize(), expected)
