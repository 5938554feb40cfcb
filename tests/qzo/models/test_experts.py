"""Mixture of experts."""

import weakref

import pytest
import torch
from gptq_files import write_gptq
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from qzo.checkpoints.load import load
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.live.scales import quantized_layers
from qzo.models.experts import QuantExperts
from qzo.quantizers.quantize import quantize


class Stacked(nn.Module):
    """Experts of any name, with the attributes that matter."""

    def __init__(self, gate_up=(4, 96, 64), down=(4, 64, 48), **attributes):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(gate_up)), nn.Parameter(torch.randn(down))
        self.act_fn = nn.SiLU()
        for name, value in attributes.items():
            setattr(self, name, value)


def test_experts_equal_the_dense_module_with_the_same_weights(make_model, input_ids):
    model = make_model("mixtral")
    quantized = make_model("mixtral")
    quantized.load_state_dict(model.state_dict())
    quantize(quantized, 8, 32)
    for dense, ours in zip(model.model.layers, quantized.model.layers, strict=True):
        experts = ours.mlp.experts
        assert isinstance(experts, QuantExperts)
        for name in ("gate_up_proj", "down_proj"):
            weights = torch.stack([layer.dequantize() for layer in getattr(experts, name)])
            getattr(dense.mlp.experts, name).data.copy_(weights)
    states, index, weights = torch.randn(10, 64), torch.randint(0, 4, (10, 2)), torch.rand(10, 2)
    dense, ours = model.model.layers[0].mlp.experts, quantized.model.layers[0].mlp.experts
    torch.testing.assert_close(ours(states, index, weights), dense(states, index, weights), rtol=1e-4, atol=1e-6)


def test_an_expert_without_tokens_adds_nothing():
    model = quantize(nn.Sequential(Stacked()), group_size=16)
    states, index, weights = torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2)
    first = model[0](states, index, weights)
    model[0].down_proj[1].scales.fill_(float("nan"))
    assert torch.equal(model[0](states, index, weights), first)


def test_each_expert_asks_for_its_tokens_once(monkeypatch):
    model = quantize(nn.Sequential(Stacked()), group_size=16)
    calls = []
    nonzero = torch.nonzero
    monkeypatch.setattr(torch, "nonzero", lambda mask: calls.append(mask.shape) or nonzero(mask))
    model[0](torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2))
    assert calls == [(3, 2)] * 4


def test_stacked_weights_are_gone_and_every_expert_has_layers_of_its_own():
    model = quantize(nn.Sequential(Stacked()), group_size=16)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 8 and not list(model.parameters())


def test_one_stack_is_freed_before_the_next_is_quantized(monkeypatch):
    model = nn.Sequential(Stacked())
    gate_up = weakref.ref(model[0].gate_up_proj)
    alive = []
    original = QuantLinear.from_weight.__func__

    def watched(cls, *args):
        alive.append(gate_up() is not None)
        return original(cls, *args)

    monkeypatch.setattr(QuantLinear, "from_weight", classmethod(watched))
    quantize(model, group_size=16)
    assert alive == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    "stacked",
    [
        Stacked(gate_up=(4, 64, 96), down=(4, 48, 64)),
        Stacked(is_transposed=True),
        Stacked(is_concatenated=False),
        Stacked(gate_up_proj_bias=nn.Parameter(torch.randn(4, 96))),
    ],
)
def test_other_experts_are_refused_before_anything_is_replaced(stacked):
    model = nn.Sequential(nn.Linear(64, 64), stacked)
    with pytest.raises(QzoError, match=r"^1: experts of type Stacked are not supported"):
        quantize(model, group_size=16)
    assert type(model[0]) is nn.Linear


def test_experts_of_another_make_that_a_checkpoint_leaves_unquantized_stay_as_they_are(tmp_path, input_ids):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**sizes, **heads, pad_token_id=0, layer_types=["full_attention"] * 2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    write_gptq(model, tmp_path / "model", 4)
    loaded = load(tmp_path / "model", torch.float32)
    layers = quantized_layers(loaded)
    assert len(layers) == 8 and type(loaded.model.layers[0].mlp.experts) is type(model.model.layers[0].mlp.experts)
    for path, layer in layers.items():
        model.get_submodule(path).weight.data = layer.dequantize()
    model.load_state_dict(loaded.state_dict(), strict=False)
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
