"""The live view of the scales."""

import pytest
import torch
from torch import nn

from qzo.errors import QzoError
from qzo.live.scales import in_layers, quantized_bytes, quantized_tensors, scales
from qzo.live.trainable import trainable
from qzo.quantizers.aqlm import quantize_random
from qzo.quantizers.quantize import quantize


@pytest.mark.parametrize("kind", ["gptq", "embeddings", "aqlm"])
def test_a_change_of_any_scale_moves_the_output(make_model, input_ids, kind):
    model = make_model(tied=True)
    if kind == "aqlm":
        quantize_random(model, 0)
    else:
        quantize(model, 4, 32, embeddings=8 if kind == "embeddings" else None)
    before = model(input_ids).logits
    for name, scale in scales(model, vocabulary=True).items():
        assert model.get_buffer(name) is scale
        old = scale.clone()
        scale.mul_(1.5)
        assert not torch.equal(model(input_ids).logits, before), name
        scale.copy_(old)
    assert torch.equal(model(input_ids).logits, before)


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(QzoError, match=r"call qzo\.quantize"):
        scales(nn.Sequential(nn.Linear(8, 8)))


def test_shared_tables_count_once(make_model):
    tied, untied = (quantize(make_model(tied=tied), 4, 32, embeddings=8) for tied in (True, False))
    assert quantized_bytes(untied)["codes"] - quantized_bytes(tied)["codes"] == 96 * 64
    assert quantized_bytes(untied)["scale_count"] - quantized_bytes(tied)["scale_count"] == 96 * 2


def test_components_cover_every_buffer_of_a_quantized_layer(make_model):
    model = quantize(make_model(), 4, 32)
    tensors = [tensor for parts in quantized_tensors(model).values() for tensor in parts]
    assert len(tensors) == len(scales(model)) * 4


def test_a_vocabulary_is_trained_where_it_is_asked_for(make_model):
    model = quantize(make_model(tied=True), 4, 32, embeddings=8)
    own, every = scales(model), scales(model, vocabulary=True)
    assert every.keys() - own.keys() == {"model.embed_tokens.scales"} and len(own) == 14
    groups = trainable(model, "scales+vocabulary")
    assert [list(group["params"]) for group in groups] == [list(own), ["model.embed_tokens.scales"]]
    with pytest.raises(QzoError, match="has no quantized vocabulary"):
        trainable(quantize(make_model(), 4, 32), "scales+vocabulary")


@pytest.mark.parametrize(
    ("layers", "message"), [((1, 9), "1 ... 9; this model has layers 0 ... 1"), ((7, 9), "7 ... 9")]
)
def test_a_range_must_lie_within_the_layers_of_the_model(make_model, layers, message):
    model = quantize(make_model(), 4, 32)
    assert len(scales(model, (0, 1))) == 14 and len(scales(model, (1, 1))) == 7
    with pytest.raises(QzoError, match=f"there are no layers {message}"):
        scales(model, layers)
    plain = in_layers(dict(model.named_buffers()), 1, 1, paths=["model.layers.7", "vision.layers.30"])
    assert plain and all(".1." in name for name in plain)
    with pytest.raises(QzoError, match=r"this model has layers 0 \.\.\. 7"):
        in_layers(dict(model.named_buffers()), 1, 8, paths=["model.layers.7", "vision.layers.30"])
