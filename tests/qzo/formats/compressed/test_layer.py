"""Layers of compressed-tensors against the library's decompression, in every layout, whole and in rows."""

from __future__ import annotations

import pytest
import torch

from qzo import QzoError
from qzo.formats.compressed.layer import CompressedLinear
from qzo.formats.compressed.scheme import scheme_of
from qzo.kernels import native

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
from cases_compressed import group
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationScheme, initialize_module_for_quantization
from compressed_tensors.quantization.utils import calculate_qparams

LAYOUTS = {
    "w4": group(4, 32),
    "w4-asymmetric": group(4, 32, asymmetric=True),
    "w4-rows": group(4),
    "w4-tensor": group(4, strategy="tensor"),
    "w2": group(2, 16, asymmetric=True),
    "w8": group(8, 32),
    "w8-asymmetric": group(8, asymmetric=True),
    "w8-tensor": group(8, strategy="tensor", asymmetric=True),
    "w4-words-not-full": group(4, 12, asymmetric=True),
    "w8-words-not-full": group(8, asymmetric=True),
    "int8": group(8, format="int-quantized"),
    "naive8": group(8, 32, asymmetric=True, format="naive-quantized"),
    "naive4": group(4, 32, asymmetric=True, format="naive-quantized"),
    "naive3-tensor": group(3, strategy="tensor", asymmetric=True, format="naive-quantized"),
}


def module_of(about, dtype, rows=52, columns=96):
    """An nn.Linear that the library has compressed."""
    linear = torch.nn.Linear(columns, rows, dtype=dtype)
    initialize_module_for_quantization(linear, scheme := QuantizationScheme.model_validate(about))
    settings, weight = scheme.weights, linear.weight.data + 0.02
    if settings.strategy == "tensor":
        low, high = (bound.view(1) for bound in weight.aminmax())
    else:
        low, high = weight.unflatten(1, (-1, settings.group_size or columns)).aminmax(dim=2)
    scale, zero = calculate_qparams(low, high, settings)
    linear.weight_scale.data.copy_(scale)
    linear.weight_zero_point.data.copy_(zero)
    compress_module(linear)
    return linear


def layer_of(linear, about):
    tensors = {name: tensor.data.clone() for name, tensor in linear.named_parameters() if name.startswith("weight")}
    tensors.pop("weight_shape", None)
    return CompressedLinear(scheme_of(about, None), (linear.out_features, linear.in_features), tensors, linear.bias)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_library_to_the_bit(kind, dtype):
    columns = 60 if kind == "w4-words-not-full" else 50 if kind == "w8-words-not-full" else 96
    linear = module_of(LAYOUTS[kind], dtype, columns=columns)
    layer = layer_of(linear, LAYOUTS[kind])
    decompress_module(linear)
    assert torch.equal(layer.dequantize(dtype), linear.weight)
    for start, stop in ((0, 5), (3, 11), (51, 52), (0, 52)):
        assert torch.equal(layer._rows(start, stop, dtype, layer.scales), linear.weight[start:stop])
    with native.by_operators():
        assert torch.equal(layer.dequantize(dtype), linear.weight)
    x = torch.randn(3, columns, dtype=dtype)
    assert (layer(x) - (y := linear(x))).abs().max() <= 4 * torch.finfo(dtype).eps * y.abs().max()


def test_columns_in_an_order_of_their_own_have_the_scales_of_their_groups():
    about = group(4, 32, asymmetric=True)
    linear = module_of(about, torch.float32)
    tensors = {name: tensor.data.clone() for name, tensor in linear.named_parameters() if name.startswith("weight")}
    del tensors["weight_shape"]
    g_idx = (torch.randperm(96) // 32).int()
    ordered = scheme_of({**about, "weights": {**about["weights"], "actorder": "group"}}, None)
    plain = CompressedLinear(scheme_of(about, None), (52, 96), tensors)
    layer = CompressedLinear(ordered, (52, 96), {**tensors, "weight_g_idx": g_idx})
    codes = plain.dequantize() / plain.scales.repeat_interleave(32, 1) + plain._zeros(0, 52).repeat_interleave(32, 1)
    expected = (codes - layer._zeros(0, 52)[:, g_idx]) * layer.scales[:, g_idx]
    torch.testing.assert_close(layer.dequantize(), expected)
    with native.by_operators():
        torch.testing.assert_close(layer.dequantize(), expected)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_next_forward_sees_other_scales_and_gradients_are_theirs(kind):
    columns = 60 if "words-not-full" in kind else 96
    layer = layer_of(module_of(LAYOUTS[kind], torch.float32, columns=columns), LAYOUTS[kind])
    x, before = torch.randn(3, columns), layer.dequantize()
    layer.scales.mul_(1.5)
    torch.testing.assert_close(layer(x), x @ (1.5 * before).t() + layer.bias)
    layer.scales.requires_grad_()
    layer(x).square().sum().backward()
    y = (x @ (1.5 * before).t() + layer.bias).detach()
    expected = (2 * y.t() @ x * before).sum()  # along the way that lets all scales grow by the same part
    torch.testing.assert_close((layer.scales.grad * layer.scales / 1.5).sum(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_empty_layer_has_the_tensors_of_a_checkpoint(kind):
    layer = layer_of(module_of(LAYOUTS[kind], torch.bfloat16, columns=192), LAYOUTS[kind])
    empty = CompressedLinear.empty(192, 52, layer.scheme, bias=True, device="meta")
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in layer.state_dict().items()
    }
    assert empty.group_size == layer.group_size and "format=" in repr(empty) and empty.qweight is empty.codes


def test_tensors_that_do_not_belong_together_are_refused():
    about = group(4, 32)
    sound = dict(layer_of(module_of(about, torch.float32), about).stored())
    wrong = {
        "weight_packed is torch.int32 (52, 11)": {"weight_packed": sound["weight_packed"][:, :11]},
        "weight_packed is torch.int64": {"weight_packed": sound["weight_packed"].long()},
        "weight_scale is torch.float32 (52, 2), but a weight": {"weight_scale": sound["weight_scale"][:, :2]},
        "weight_scale is torch.float64": {"weight_scale": sound["weight_scale"].double()},
        "weight_zero_point has no place beside 4-bit codes": {"weight_zero_point": torch.zeros(7, 3)},
        "weight_scale is missing": {"weight_scale": None},
    }
    for message, change in wrong.items():
        tensors = {name: tensor for name, tensor in {**sound, **change}.items() if tensor is not None}
        with pytest.raises(QzoError) as caught:
            CompressedLinear(scheme_of(about, None), (52, 96), tensors)
        assert message in str(caught.value)
    with pytest.raises(QzoError, match="rows of 100 weights are not divisible into groups of 32"):
        CompressedLinear.empty(100, 52, scheme_of(about, None))
    with pytest.raises(QzoError, match=r"the bias has shape \(3,\)"):
        CompressedLinear(scheme_of(about, None), (52, 96), sound, torch.zeros(3))
