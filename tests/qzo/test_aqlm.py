"""AQLM layers with random codes."""

import pytest
import torch
from torch import nn

from qzo import aqlm, chunked
from qzo.aqlm import AqlmLinear
from qzo.errors import QzoError
from qzo.scales import quantized_bytes


def test_weight_is_scale_times_codebook_entry():
    layer = AqlmLinear.random(32, 6, dtype=torch.float32)
    layer.scales.normal_()
    weight = layer.dequantize()
    for row, group in [(0, 0), (5, 3), (2, 1)]:
        entry = layer.codebooks[0, int(layer.codes[row, group, 0]) % 2**16, 0]
        assert torch.equal(weight[row, 8 * group : 8 * group + 8], layer.scales[row, 0, 0, 0] * entry)


def test_forward_equals_the_dense_product(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 5 * 64)
    layer = AqlmLinear.random(64, 24, bias=torch.randn(24), dtype=torch.float32)
    x = torch.randn(2, 3, 64)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_scales_is_that_of_the_dense_product():
    layer = AqlmLinear.random(64, 24, dtype=torch.float32)
    layer.scales.requires_grad_()
    x = torch.randn(3, 64)
    ours = torch.autograd.grad(layer(x).square().sum(), layer.scales)[0]
    dense = x @ layer._rows(0, 24, torch.float32, layer.scales).t()
    torch.testing.assert_close(ours, torch.autograd.grad(dense.square().sum(), layer.scales)[0])


def test_random_codes_come_from_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = (AqlmLinear.random(64, 24, seed=seed, std=0.3) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.codebooks, b.codebooks)
    assert not torch.equal(a.codes, c.codes)
    assert a.codes.min() < 0 < a.codes.max() and abs(a.dequantize().std() - 0.3) < 0.03


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_whole_models_are_replaced_layer_by_layer(make_model, input_ids, family):
    model = aqlm.quantize_random(make_model(family), seed=3)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == ["lm_head"] and not any(p.requires_grad for p in model.parameters())
    assert torch.isfinite(model(input_ids).logits).all()


def test_exact_bytes_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 256, dtype=torch.bfloat16))
    sizes = quantized_bytes(aqlm.quantize_random(model, 0))
    expected = {"codes": 256 * 64 * 2, "codebooks": 2**16 * 8 * 2, "scales": 256 * 2, "scale_count": 256}
    assert sizes == {**expected, "zero_points": 0, "g_idx": 0}
    assert model(torch.empty(3, 512, dtype=torch.bfloat16, device="meta")).shape == (3, 256)


def test_input_width_must_be_a_multiple_of_eight():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12), nn.Linear(12, 8))
    with pytest.raises(QzoError, match=r"^2: in_features=12 is not divisible by 8"):
        aqlm.quantize_random(model)
    assert type(model[0]) is nn.Linear
