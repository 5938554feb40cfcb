"""Quantizing whole models in place."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.vocabulary import QuantEmbedding, TiedQuantHead
from qzo.live.scales import quantized_bytes, scales
from qzo.quantizers.quantize import quantize

FAMILIES = ["llama", "gpt2", "opt", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_replaced_and_the_model_answers_alike(make_model, input_ids, family):
    model = make_model(family)
    before = model(input_ids).logits
    assert quantize(model, 8, 32) is model
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Conv1D" not in kinds and [n for n, m in model.named_modules() if type(m) is nn.Linear] == ["lm_head"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(input_ids).logits, before, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_can_be_quantized_too(make_model, input_ids, family, tied):
    model = make_model(family, tied=tied)
    before = model(input_ids).logits
    quantize(model, 8, 32, embeddings=8)
    torch.testing.assert_close(model(input_ids).logits, before, rtol=0.05, atol=0.03)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding) and isinstance(head, TiedQuantHead)
    assert (head.table is embedding) == (tied or family == "gpt2")
    tables = {id(module) for module in model.modules() if isinstance(module, QuantEmbedding)}
    assert sum(name.endswith("scales") for name in scales(model)) == len(scales(model))
    assert len(tables) == (1 if tied or family == "gpt2" else 2)


def test_the_bad_layer_is_named_before_the_first_is_replaced():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 320))
    with pytest.raises(QzoError, match=r"^2: in_features=96 is not divisible by group_size=64; choose 32, or -1$"):
        quantize(model, group_size=64)
    assert all(type(layer) is nn.Linear for layer in model)
    quantize(model, group_size=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bits": 5}, "n_bits=5"),
        ({"method": "gptq"}, 'method="gptq"'),
        ({"embeddings": 4}, "embeddings=4"),
        ({"embeddings": 8}, "input embedding"),
    ],
)
def test_unknown_options_are_refused(options, message):
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(QzoError, match=message):
        quantize(model, **{"group_size": 32, **options})
    assert type(model[0]) is nn.Linear


def test_quantizing_twice_is_refused(make_model):
    model = quantize(make_model(), group_size=32)
    with pytest.raises(QzoError, match="no layer to quantize"):
        quantize(model, group_size=32)


def test_subclasses_of_linear_are_refused():
    with pytest.raises(
        QzoError,
        match=r"^attention\.out_proj: cannot quantize a NonDynamicallyQuantizableLinear, .* start from one with plain",
    ):
        quantize(nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4)}), group_size=32)


def test_a_layer_that_nothing_holds_is_refused():
    with pytest.raises(QzoError, match="pass the module that holds it"):
        quantize(nn.Linear(64, 64), group_size=32)


def test_a_layer_that_stands_in_two_places_is_replaced_in_both():
    shared = nn.Linear(64, 64)
    model = quantize(nn.Sequential(shared, nn.ReLU(), shared), group_size=32)
    assert isinstance(model[0], QuantLinear) and model[0] is model[2] and len(scales(model)) == 1


def test_old_weights_are_freed_layer_by_layer(monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    old = [weakref.ref(layer.weight) for layer in model]
    alive = []
    original = QuantLinear.from_weight.__func__

    def watched(cls, *args):
        gc.collect()
        alive.append(sum(reference() is not None for reference in old))
        return original(cls, *args)

    monkeypatch.setattr(QuantLinear, "from_weight", classmethod(watched))
    quantize(model, group_size=32)
    assert alive == [4, 3, 2, 1] and not any(reference() for reference in old)


def test_llama2_13b_on_meta_has_the_published_number_of_scales():
    config = LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    sizes = quantized_bytes(quantize(model))
    assert sizes == {
        "codes": 6_343_884_800,
        "scales": 2 * 99_123_200,
        "zero_points": 99_123_200 // 2,
        "g_idx": 40 * 4 * (6 * 5120 + 13824),
        "codebooks": 0,
        "scale_count": 99_123_200,
    }


def test_a_weight_that_is_not_finite_leaves_the_whole_model_as_it_was():
    from transformers import LlamaConfig, LlamaForCausalLM

    import qzo

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(qzo.QzoError, match=r"layers\.1\.mlp\.down_proj.*not finite"):
        qzo.quantize(model, group_size=32, embeddings=8)
    assert not any(isinstance(module, qzo.QuantLinear) for module in model.modules())
    assert type(model.model.embed_tokens) is torch.nn.Embedding
