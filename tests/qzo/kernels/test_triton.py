"""Kernels in Triton against PyTorch's operators, by its interpreter: the same weights to the bit, products as exact."""

import pytest
import torch
from packed_layers import FORMATS, awq, gguf, gptq, nf4
from triton_kernels import kernels, on_the_cpu

from qzo.kernels import fused

SHAPE = 96, 160  # tiles of 64 x 32 and of 16 x 128 go beyond it, and those of a product
ODD = {
    "awq, words that no tile fills": lambda: awq((72, 64)),
    "gptq, a group longer than a tile": lambda: gptq((40, 256), group_size=128, symmetric=False),
    "gptq, one group": lambda: gptq((32, 96), group_size=-1, symmetric=False),
    "gptq, a last group that is shorter": lambda: gptq((32, 80), group_size=32, short_group=True),
    "gptq, groups of no power of two": lambda: gptq((32, 144), group_size=48, symmetric=False),
    "gptq, fp32 scales": lambda: gptq((32, 64), dtype=torch.float32),
    "gguf, one block and one row": lambda: gguf((1, 32), "Q4_0"),
    "gguf, offsets": lambda: gguf((17, 160), "Q4_1"),
    "nf4, blocks across rows": lambda: nf4((17, 98)),
    "nf4, a block longer than a tile": lambda: nf4((3, 512), block_size=256),
    "nf4, a last block that is shorter": lambda: nf4((5, 50)),
}  # fmt: skip


def rebuilt(layer, start, stop, dtype):
    packed = layer.packed()
    rows, depth = stop - start, packed.shape[1]
    weight = torch.full((rows, depth), torch.nan, dtype=dtype)
    if packed.layout < 2:
        weight = weight.t().contiguous().t()
    kernels("launch", True).rebuild(weight, packed, start)
    return weight


def by_operators(layer, dtype):
    return layer.dequantize(torch.float32).to(dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_rebuilt_weights_have_the_bits_that_operators_give(name):
    layer = FORMATS[name](SHAPE)
    weight = by_operators(layer, torch.float32)
    assert torch.equal(rebuilt(layer, 0, 96, torch.float32), weight)
    assert torch.equal(rebuilt(layer, 64, 91, torch.float16), weight[64:91].half())  # a part, as of a large layer


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_are_rebuilt_and_multiplied(name):
    layer = ODD[name]()
    weight = by_operators(layer, torch.float32)
    assert torch.equal(rebuilt(layer, 0, len(weight), torch.float32), weight)
    x = torch.randn(1, weight.shape[1])  # one token
    with on_the_cpu():
        assert_close(fused.product(x, layer.packed), x, weight)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which the interpreter computes with
def test_scales_of_every_kind_give_the_same_bits():
    """Subnormal, negative, infinite and NaN."""
    layer = gptq((32, 64), group_size=32, dtype=torch.float32)
    layer.scales.view(torch.int32).random_(-(2**31), 2**31 - 1)
    layer.scales.view(torch.int32)[0, :3] = torch.tensor([0x7FFFFFFF, -(2**23), 1], dtype=torch.int32)
    ours, theirs = rebuilt(layer, 0, 32, torch.float32), by_operators(layer, torch.float32)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(1.5), theirs.nan_to_num(1.5))


def test_bf16_is_what_fp32_is_but_for_the_interpreter_which_truncates():
    layer = gptq((32, 64))
    bits = by_operators(layer, torch.float32).view(torch.int32)
    assert torch.equal(rebuilt(layer, 0, 32, torch.bfloat16).float().view(torch.int32), bits & -65536)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_with_the_rounded_weight(name):
    layer = FORMATS[name](SHAPE)
    weight = by_operators(layer, torch.float16)
    x = torch.randn(2, 9, 160).half()
    with on_the_cpu():
        y = layer(x)
        assert y.dtype == torch.float16 and torch.equal(layer(x[:, 4]), y[:, 4])  # whatever the other rows are
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(y.double(), exact, rtol=2**-10, atol=1e-2)


def test_more_rows_than_a_tile_and_rows_that_lie_apart():
    layer = gguf((40, 64), "Q4_0")
    weight, x = by_operators(layer, torch.float32), torch.randn(70, 128)[:, ::2][:, :64]
    assert_close(product(layer, x), x, weight)
    assert_close(product(layer, x[::3].contiguous()[:, :64]), x[::3], weight)
    strided = torch.randn(20, 100)[:, :64]
    assert_close(product(layer, strided), strided, weight)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_scale_stays_in_its_columns():
    layer, x = gptq((64, 96), group_size=64, short_group=True), torch.randn(2, 96)
    layer.scales[1, 7] = torch.inf
    y = product(layer, x)
    assert not y[:, 7].isfinite().any() and y[:, :7].isfinite().all() and y[:, 8:].isfinite().all()


def test_layers_with_a_bias_and_many_tokens_go_the_same_way(monkeypatch):
    monkeypatch.setattr(fused, "_most", 8)
    monkeypatch.setattr(fused, "REBUILT_ELEMENTS", 64 * 96)  # two parts
    layer = awq((96, 96))
    layer.bias = torch.nn.Parameter(torch.randn(96), requires_grad=False)
    weight, x = by_operators(layer, torch.float32), torch.randn(3, 5, 96)
    with on_the_cpu():
        y = layer(x)
    assert_close(y - layer.bias, x, weight)


def product(layer, x):
    y = torch.empty(len(x), layer.packed().shape[0])
    kernels("launch", True).multiply(y, layer.packed(), x)
    return y


def assert_close(y, x, weight):
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)
