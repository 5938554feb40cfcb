"""Scales stay the tensors that an optimizer holds, whatever it is converted to; a loss that never moves is told."""

import warnings

import pytest
import standin
import torch
from tiny import OffsetLinear, Tiny
from torch import nn

from qzo import QZO, MeZO, QuantLinear, QzoError, load, quantize, scales
from qzo.live.scales import quantized_layers

CONVERSIONS = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "like": lambda model: model.to(torch.zeros(1, dtype=torch.float64)),
    "device": lambda model: model.to("cpu"),
    "apply": lambda model: model._apply(lambda tensor: tensor.clone()),
}


@pytest.mark.parametrize("how", CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_survive_a_conversion_and_are_trained_after_it(make_model, input_ids, how, dtype):
    model = quantize(make_model(dtype=dtype), 4, 32, embeddings=8)
    live = scales(model)
    before = {name: scale.clone() for name, scale in live.items()}
    optimizer = QZO(live, lr=1e-5)
    CONVERSIONS[how](model)
    after = scales(model)
    assert all(after[name] is live[name] and torch.equal(live[name], before[name]) for name in live)
    head, table = model.lm_head, model.model.embed_tokens
    assert not hasattr(head, "scales") or head.scales is table.scales or head.scales is live["lm_head.scales"]
    optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
    assert optimizer.last.directional_derivative != 0
    assert not all(torch.equal(scales(model)[name], before[name]) for name in before)


def test_codes_and_other_tensors_are_converted_as_ever(make_model):
    model = quantize(make_model(dtype=torch.bfloat16), 4, 32)
    codes = {path: layer.qweight for path, layer in quantized_layers(model).items()}
    model.float()
    assert model.model.norm.weight.dtype == torch.float32
    assert all(layer.qweight is codes[path] for path, layer in quantized_layers(model).items())
    assert all(scale.dtype == torch.float16 for scale in scales(model).values())
    assert all(scale.is_meta for scale in scales(model.to("meta")).values())


def test_offsets_stay_beside_their_scales():
    model = nn.Sequential(OffsetLinear.from_quantized(QuantLinear.from_weight(torch.randn(32, 64), None, 4, 32)))
    offsets, scale = model[0].offsets, model[0].scales
    model.half()
    assert model[0].offsets is offsets and model[0].scales is scale and offsets.dtype == scale.dtype == torch.float32


def test_masters_elsewhere_than_their_scales_are_told(make_model):
    model = quantize(make_model(), 4, 32)
    optimizer = QZO(scales(model))
    state = optimizer.state[next(iter(scales(model).values()))]
    state["master"] = state["master"].to("meta")
    with pytest.raises(QzoError, match=r"on cpu now, their masters on meta; make the optimizer anew after model\.to"):
        optimizer.step(lambda: 1.0)


@pytest.mark.parametrize("kind", [QZO, MeZO])
def test_losses_that_never_move_are_told_once(kind):
    model = Tiny()
    optimizer = kind({name: scale.clone() for name, scale in scales(model).items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(9):
            optimizer.step(lambda: model.loss(step))  # noqa: B023
    with pytest.warns(UserWarning, match=r"10 steps in a row, up to step 9, .* to the bit: .* qzo\.check_live tells"):
        optimizer.step(model.loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(model.loss)


def test_losses_that_move_now_and_then_or_are_not_finite_are_not_told():
    model = Tiny()
    optimizer = QZO(scales(model), max_skipped=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(30):
            optimizer.step(lambda: model.loss(step) if step % 9 == 8 else 1.0)  # noqa: B023
        for _ in range(12):
            optimizer.step(lambda: float("nan"))


def test_a_loss_that_was_never_finite_is_not_blamed_on_lr():
    optimizer = QZO(scales(Tiny()), max_skipped=3)
    with pytest.raises(QzoError, match=r"no loss was finite yet and the weights are untouched; a float16 model may"):
        for _ in range(3):
            optimizer.step(lambda: float("nan"))


def test_a_trainer_follows_a_model_that_was_converted_after_its_optimizer_was_made(make_model, tmp_path):
    folder = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True)
    model = load(folder)
    optimizer = QZO(scales(model), lr=1e-4)
    model.float()
    before = {name: scale.clone() for name, scale in scales(model).items()}
    optimizer.step(lambda: model(torch.arange(5, 13)[None], labels=torch.arange(5, 13)[None]).loss)
    assert any(not torch.equal(scales(model)[name], before[name]) for name in before)
