"""QuantLinear against its own dequantized weight; what it must never hold."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.kernels import native
from qzo.kernels import rebuilt as chunked


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that an operation returned, among those not seen before."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def shuffled(layer):
    """The layer with an act-order g_idx, as `desc_act` checkpoints have."""
    layer.g_idx.copy_(layer.g_idx[torch.randperm(layer.in_features)])
    layer.read_layout()
    return layer


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_forward_equals_the_dequantized_product(monkeypatch, n_bits, group_size, symmetric, act_order):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * 96)  # chunks that end within a word of zero points
    weight, bias = torch.randn(64, 96), torch.randn(64)
    layer = QuantLinear.from_weight(weight, bias, n_bits, group_size, symmetric)
    if act_order:
        shuffled(layer)
    x = torch.randn(2, 3, 96)
    expected = nn.functional.linear(x, layer.dequantize(), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    steps = layer.scales.float().repeat_interleave(layer.group_size, 0).t()
    assert act_order or ((layer.dequantize() - weight).abs() <= steps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_have_fp16_scales_and_answer_in_their_dtype(dtype):
    layer = QuantLinear.from_weight(torch.randn(32, 64, dtype=dtype), torch.randn(32, dtype=dtype), group_size=32)
    x = torch.randn(5, 64, dtype=dtype)
    expected = nn.functional.linear(x.float(), layer.dequantize(), layer.bias.float())
    assert layer.scales.dtype == torch.float16 and layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("has", [True, False])
def test_bf16_answers_agree_with_and_without_16_bit_instructions(monkeypatch, has):
    monkeypatch.setattr(chunked, "has_bf16", lambda: has)
    layer = QuantLinear.from_weight(torch.randn(32, 64).bfloat16(), group_size=32)
    x = torch.randn(5, 64).bfloat16()
    with native.by_operators():
        torch.testing.assert_close(layer(x).float(), x.float() @ layer.dequantize().t(), rtol=0.02, atol=0.1)


def test_exact_bytes_of_a_layer():
    layer = QuantLinear.from_weight(torch.randn(256, 512).bfloat16(), torch.randn(256).bfloat16(), 4, 128)
    sizes = {name: tensor.nbytes for name, tensor in (*layer.named_buffers(), *layer.named_parameters())}
    assert sizes == {
        "qweight": 256 * 512 // 2,
        "qzeros": 512 // 128 * 256 // 2,
        "scales": 512 // 128 * 256 * 2,
        "g_idx": 512 * 4,
        "bias": 256 * 2,
    }


def test_a_change_of_the_scales_reaches_the_next_forward():
    layer = QuantLinear.from_weight(torch.randn(32, 64), group_size=32)
    x = torch.randn(3, 64)
    before = layer(x)
    layer.scales.mul_(1.5)
    torch.testing.assert_close(layer(x), 1.5 * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_full_precision_weight_is_born_in_forward_or_backward_nor_kept(dtype):
    layer = QuantLinear.from_weight(torch.randn(2048, 6144, dtype=dtype), group_size=128)
    x = torch.randn(1, 6144, dtype=dtype, requires_grad=True)
    held = sum(tensor.untyped_storage().nbytes() for tensor in layer.buffers())
    with LargestTensor([*layer.buffers(), x]) as largest:
        y = layer(x)
        y.sum().backward()
    assert 0 < largest.bytes <= 4 * chunked.CHUNK_ELEMENTS < 2048 * 6144 * 2
    assert sum(tensor.untyped_storage().nbytes() for tensor in layer.buffers()) == held
    assert not [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("act_order", [False, True])
def test_gradients_of_input_and_scales_equal_those_of_the_dense_product(monkeypatch, act_order):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * 64)
    layer = QuantLinear.from_weight(torch.randn(48, 64), torch.randn(48), group_size=16)
    if act_order:
        shuffled(layer)
    layer.scales.requires_grad_()
    x = torch.randn(2, 5, 64, requires_grad=True)
    target = torch.randn(2, 5, 48)
    ours = torch.autograd.grad((layer(x) * target).sum(), [x, layer.scales])
    dense = nn.functional.linear(x, layer._rows(0, 48, torch.float32, layer.scales))
    expected = torch.autograd.grad((dense * target).sum(), [x, layer.scales])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nothing_is_recorded_under_no_grad():
    layer = QuantLinear.from_weight(torch.randn(32, 64), group_size=32)
    with torch.no_grad():
        assert layer(torch.randn(3, 64, requires_grad=True)).grad_fn is None
    assert layer(torch.randn(3, 64)).grad_fn is None


def test_meta_layers_answer_with_shapes():
    with torch.device("meta"):
        layer = QuantLinear.empty(128, 64, bias=True)
    y = layer(torch.randn(2, 128, device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (2, 64) and y.dtype == torch.bfloat16
    assert QuantLinear.from_weight(torch.empty(64, 128, device="meta")).qweight.is_meta


def test_state_dict_and_copies_keep_the_act_order():
    layer = shuffled(QuantLinear.from_weight(torch.randn(32, 64), group_size=16))
    x = torch.randn(3, 64)
    other = QuantLinear.empty(64, 32, 4, 16, dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    assert other.act_order and torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_inputs_of_another_width_are_refused():
    layer = QuantLinear.from_weight(torch.randn(32, 64), group_size=16)
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, 32))


def test_bias_is_frozen_and_shared():
    bias = nn.Parameter(torch.randn(32))
    layer = QuantLinear.from_weight(torch.randn(32, 64), bias, group_size=32)
    assert not layer.bias.requires_grad and layer.bias.data_ptr() == bias.data_ptr()


@pytest.mark.parametrize(("shape", "n_bits"), [((60, 64), 4), ((64, 60), 4), ((60, 64), 2), ((34, 64), 8)])
def test_sizes_that_do_not_fill_words_are_refused(shape, n_bits):
    with pytest.raises(QzoError, match="is not a multiple of"):
        QuantLinear.from_weight(torch.randn(shape), n_bits=n_bits, group_size=-1)
    QuantLinear.from_weight(torch.randn(64, 64), n_bits=n_bits, group_size=-1)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_one_zero_point_for_all_is_a_number_and_gives_the_same_weights(n_bits, act_order):
    layer = QuantLinear.from_weight(torch.randn(64, 96).bfloat16(), n_bits=n_bits, group_size=32)
    if act_order:
        shuffled(layer)
    assert layer.zero == 2 ** (n_bits - 1)
    as_number = layer.dequantize(torch.bfloat16)
    layer.zero = None  # so that the packed zero points are read
    assert torch.equal(layer.dequantize(torch.bfloat16), as_number)


def test_the_zero_point_is_read_from_whatever_is_loaded():
    symmetric = QuantLinear.from_weight(torch.randn(32, 64), group_size=16)
    other = QuantLinear.from_weight(torch.randn(32, 64), group_size=16, symmetric=False)
    assert other.zero is None
    layer = QuantLinear.from_weight(torch.empty(32, 64, device="meta"), group_size=16)
    assert layer.zero == 8
    for source in (other, symmetric):
        layer.load_state_dict(source.state_dict(), assign=True)
        assert layer.zero == source.zero and torch.equal(layer.dequantize(), source.dequantize())
