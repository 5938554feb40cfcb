"""AQLM layers: any layout against loops over codes, random codes, and codes found by k-means."""

import pytest
import torch
from torch import nn

from qzo.errors import QzoError
from qzo.formats.aqlm.layer import AqlmLayout, AqlmLinear
from qzo.kernels import rebuilt as chunked
from qzo.live.scales import quantized_bytes
from qzo.quantizers.aqlm import from_weight, quantize_aqlm, quantize_random, random_layer

LAYOUTS = [AqlmLayout(1, 16), AqlmLayout(2, 8), AqlmLayout(1, 8, 16), AqlmLayout(3, 5, 4), AqlmLayout(2, 8, 8, 3)]


def filled(layout, columns=64, rows=24, dtype=torch.float32):
    """A layer with random tensors and unlike scales."""
    layer = AqlmLinear.empty(columns, rows, layout, True, dtype)
    half = 2 ** (layout.nbits_per_codebook - 1)
    codes = torch.randint(-half, half, layer.codes.shape)
    if layout.nbits_per_codebook not in (8, 16):  # the library leaves the upper bits at the sign
        codes[0] = torch.randint(2 * half, layer.codes.shape[1:])
    layer.codes.copy_(codes)
    for tensor in (layer.codebooks, layer.scales, layer.bias.data):
        tensor.normal_()
    return layer


def slow_weight(layer):
    """[N, K] group by group, in fp64."""
    count, size, og, ig = layer.codebooks.shape
    weight = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for i, row in enumerate(layer.codes.tolist()):
        for j, codes in enumerate(row):
            group = sum(layer.codebooks[c, codes[c] % size].double() for c in range(count))
            weight[og * i : og * i + og, ig * j : ig * j + ig] = group * layer.scales[i, 0, 0, 0].double()
    return weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{layout.in_group_size}")
def test_every_layout_is_scale_times_the_sum_of_entries(monkeypatch, layout):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 5 * 64)  # chunks that end within a group of 3 rows
    layer = filled(layout)
    weight = slow_weight(layer)
    assert layer.layout == layout and layer.codes.dtype == (torch.int8 if layout.name != "1x16" else torch.int16)
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=1e-6, atol=1e-6)
    x = torch.randn(2, 3, 64)
    expected = nn.functional.linear(x.double(), weight, layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)
    layer.scales.requires_grad_()
    ours = torch.autograd.grad(layer(x).sum(), layer.scales)[0]
    sums = (x.sum((0, 1)).double() * weight).view(-1, layout.out_group_size, 64).sum((1, 2))
    exact = (sums / layer.scales.detach().flatten().double()).view_as(ours)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


def test_half_precision_tensors_are_summed_and_scaled_in_the_dtype_asked_for():
    layer = filled(AqlmLayout(2, 8), dtype=torch.float16)
    torch.testing.assert_close(layer.dequantize().double(), slow_weight(layer), rtol=1e-6, atol=1e-6)
    assert layer.dequantize(torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 8), "num_codebooks=0"),
        ((1, 17), "nbits_per_codebook=17"),
        ((1, None), "nbits_per_codebook=None"),
        ((1, 8, 2.0), "in_group_size=2.0"),
        ((1, 8, True), "in_group_size=True"),
        ((1, 8, 8, 2**40), "out_group_size=1099511627776"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes, message):
    with pytest.raises(QzoError, match=f"AQLM with {message} is not supported; need a whole number from 1 to"):
        AqlmLayout(*sizes)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.name)
def test_kmeans_comes_close_and_no_scale_would_be_better(layout):
    weight = torch.randn(96, 128) * torch.logspace(-2, 0, 96)[:, None]
    layer = from_weight(weight, None, layout, seed=1)
    error = weight - layer.dequantize()
    relative = error.square().sum(1) / weight.square().sum(1)
    assert relative.mean() < 3 * 4**-layout.bits  # the bound of Shannon for normal numbers is 4^-bits
    torch.testing.assert_close(
        (error * layer.dequantize()).view(layer.scales.shape[0], -1).sum(1),
        torch.zeros(1).expand(layer.scales.shape[0]),
        rtol=0,
        atol=1e-3,
    )
    again = from_weight(weight, None, layout, seed=1)
    assert torch.equal(again.codes, layer.codes) and torch.equal(again.codebooks, layer.codebooks)


def test_with_as_many_entries_as_groups_nothing_but_rounding_is_lost():
    weight, bias = torch.randn(24, 64), torch.randn(24)
    layer = from_weight(weight, bias, AqlmLayout(1, 16))
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.bias, bias) and layer.codes.dtype == torch.int16
    assert from_weight(weight.to("meta"), bias.to("meta")).codes.shape == (24, 8, 2)


def test_a_row_of_zeros_stays_zero():
    weight = torch.randn(24, 64)
    weight[3] = 0
    layer = from_weight(weight)
    assert (layer.dequantize()[3] == 0).all() and torch.isfinite(layer.dequantize()).all()


def test_a_model_is_quantized_layer_by_layer(make_model, input_ids):
    model, plain = make_model(), make_model()
    plain.load_state_dict(model.state_dict())
    expected, random = plain(input_ids).logits, quantize_random(plain)(input_ids).logits
    found = quantize_aqlm(model)(input_ids).logits
    assert sum(isinstance(module, AqlmLinear) for module in model.modules()) == 14
    assert (found - expected).norm() < 0.7 * (random - expected).norm()


def test_a_layer_that_is_no_whole_number_of_groups_stays_plain_unless_it_is_most_of_the_model():
    narrow = quantize_random(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12), nn.Linear(12, 8)))
    assert [type(layer) for layer in narrow] == [AqlmLinear, AqlmLinear, nn.Linear]
    wide = nn.Sequential(nn.Linear(16, 8), nn.Linear(12, 80))
    for quantized in (quantize_aqlm, quantize_random):
        with pytest.raises(QzoError, match=r"^1: in_features=12 is not divisible by 8"):
            quantized(wide)
    assert type(wide[0]) is nn.Linear


def test_weight_is_scale_times_codebook_entry():
    layer = random_layer(32, 6, dtype=torch.float32)
    layer.scales.normal_()
    weight = layer.dequantize()
    for row, group in [(0, 0), (5, 3), (2, 1)]:
        entry = layer.codebooks[0, int(layer.codes[row, group, 0]) % 2**16, 0]
        assert torch.equal(weight[row, 8 * group : 8 * group + 8], layer.scales[row, 0, 0, 0] * entry)


def test_forward_equals_the_dense_product(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 5 * 64)
    layer = random_layer(64, 24, bias=torch.randn(24), dtype=torch.float32)
    x = torch.randn(2, 3, 64)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_scales_is_that_of_the_dense_product():
    layer = random_layer(64, 24, dtype=torch.float32)
    layer.scales.requires_grad_()
    x = torch.randn(3, 64)
    ours = torch.autograd.grad(layer(x).square().sum(), layer.scales)[0]
    dense = x @ layer._rows(0, 24, torch.float32, layer.scales).t()
    torch.testing.assert_close(ours, torch.autograd.grad(dense.square().sum(), layer.scales)[0])


def test_random_codes_come_from_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = (random_layer(64, 24, seed=seed, std=0.3) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.codebooks, b.codebooks)
    assert not torch.equal(a.codes, c.codes)
    assert a.codes.min() < 0 < a.codes.max() and abs(a.dequantize().std() - 0.3) < 0.03


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_whole_models_are_replaced_layer_by_layer(make_model, input_ids, family):
    model = quantize_random(make_model(family), seed=3)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == ["lm_head"] and not any(p.requires_grad for p in model.parameters())
    assert torch.isfinite(model(input_ids).logits).all()


def test_exact_bytes_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 256, dtype=torch.bfloat16))
    sizes = quantized_bytes(quantize_random(model, 0))
    expected = {"codes": 256 * 64 * 2, "codebooks": 2**16 * 8 * 2, "scales": 256 * 2, "scale_count": 256}
    assert sizes == {**expected, "zero_points": 0, "g_idx": 0}
    assert model(torch.empty(3, 512, dtype=torch.bfloat16, device="meta")).shape == (3, 256)
