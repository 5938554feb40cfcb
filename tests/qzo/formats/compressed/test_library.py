"""Models that the library compressed-tensors holds in memory: taken over, trained, given back, saved; and refusals."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import write_plain
from torch import nn
from transformers import AutoModelForCausalLM

import qzo
from qzo.formats.compressed import library
from qzo.formats.compressed.layer import CompressedLinear

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
from cases_compressed import compressed, group, layers_of, write

IDS = torch.randint(5, 96, (2, 12), generator=torch.Generator().manual_seed(3))
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain("llama", tmp_path_factory.mktemp("plain"))


def loss_of(model):
    with torch.no_grad():
        return model(IDS, labels=IDS).loss


def trained(model):
    """The loss after some steps, which have lowered it."""
    before = float(loss_of(model))
    assert qzo.check_live(model, lambda: loss_of(model))
    optimizer = qzo.QZO(qzo.scales(model), lr=2e-2, relative=True, clip_threshold=None)
    for _ in range(30):
        optimizer.step(lambda: loss_of(model))
    after = float(loss_of(model))
    assert after < before - 0.02
    return after


@pytest.mark.parametrize("about", [group(4, 32), group(8, format="int-quantized")], ids=["w4", "int8"])
def test_models_of_transformers_are_taken_over_trained_given_back_and_saved(plain, tmp_path, capfd, about):
    write([about], plain, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    module = model.get_submodule(Q_PROJ)
    codes, scale = module._parameters.get("weight_packed", module._parameters.get("weight")), module.weight_scale
    capfd.readouterr()
    layer = qzo.adopt(model).get_submodule(Q_PROJ)
    assert isinstance(layer, CompressedLinear) and layer.codes.data_ptr() == codes.data_ptr()
    assert layer.scales.data_ptr() == scale.data_ptr() and not model._forward_pre_hooks
    loss = trained(model)
    assert not capfd.readouterr().err  # no bar of the hook that decompresses models
    assert len(layers_of(qzo.release(model))) == 14 and model.get_submodule(Q_PROJ) is module
    model.save_pretrained(tmp_path / "out")
    assert float(loss_of(model)) == pytest.approx(loss, abs=1e-4) and module.weight.dtype == torch.float32
    again = qzo.load(tmp_path / "out", torch.float32)
    assert float(loss_of(again)) == pytest.approx(loss, abs=1e-4)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert float(loss_of(read)) == pytest.approx(loss, abs=1e-4)
    assert len(layers_of(qzo.release(again))) == 14
    assert float(loss_of(again)) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("about", [group(4, 32, asymmetric=True), group(8, asymmetric=True, format="naive-quantized")])
def test_models_quantized_in_this_process_too_and_asymmetric_ones(plain, about):
    model, compressor = compressed(plain, [about], ["lm_head"])
    loss = trained(qzo.adopt(model))
    assert float(loss_of(qzo.release(model))) == pytest.approx(loss, abs=1e-4)
    with pytest.raises(qzo.QzoError, match=rf"^{Q_PROJ}: its weight is decompressed, without codes; load the model"):
        qzo.adopt(model)
    compressor.compress_model(model)  # quantizes the same weights with the same scales
    assert float(loss_of(qzo.adopt(model))) == pytest.approx(loss, abs=1e-4)


def test_given_back_before_a_forward_it_is_taken_over_again(plain):
    model, _ = compressed(plain, [group(4, 32)], ["lm_head"])
    loss = float(loss_of(qzo.adopt(model)))
    for _ in range(2):
        qzo.adopt(qzo.release(model))
    assert float(loss_of(model)) == loss
    module = qzo.release(model).get_submodule(Q_PROJ)
    assert len(module._forward_pre_hooks) == 1
    assert float(loss_of(model)) == pytest.approx(loss, abs=1e-5)


def test_a_model_that_cannot_be_taken_over_computes_as_before(plain):
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    last = {**group(8, targets=["re:.*layers.1.mlp.down_proj"]), "input_activations": inputs}
    expected = float(loss_of(compressed(plain, [last, group(4, 32)], ["lm_head"])[0]))
    model, _ = compressed(plain, [last, group(4, 32)], ["lm_head"])
    with pytest.raises(qzo.QzoError, match=r"^model\.layers\.1\.mlp\.down_proj: input_activations are rounded too"):
        qzo.adopt(model)
    assert len(layers_of(model)) == 14
    assert float(loss_of(model)) == pytest.approx(expected, abs=1e-5)


def test_other_modules_and_states_are_refused():
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationScheme, initialize_module_for_quantization

    for module, message in (
        (nn.Embedding(8, 32), "a Embedding that compressed-tensors quantizes cannot be trained"),
        (nn.Linear(32, 8), "its weight is initialized, without codes"),
    ):
        about = {**group(4, 32), "format": None}
        initialize_module_for_quantization(module, QuantizationScheme.model_validate(about))
        if isinstance(module, nn.Embedding):
            module.weight_scale.data.fill_(1)
            compress_module(module)
        with pytest.raises(qzo.QzoError, match=message):
            qzo.adopt(nn.Sequential(module))
    assert library.adopt(nn.Linear(3, 3)) is None
    module = nn.Linear(3, 3)
    initialize_module_for_quantization(module, QuantizationScheme(targets=["Linear"]))
    assert library.adopt(module) is None  # nothing of it is quantized


def test_columns_in_their_own_order_stay_here(plain, tmp_path, monkeypatch):
    write([group(4, 32)], plain, tmp_path / "ordered", order=True)
    with pytest.raises(qzo.QzoError, match="no longer has columns in an order of their own"):
        qzo.release(qzo.load(tmp_path / "ordered", torch.float32))
    write([group(4, 32)], plain, tmp_path / "model")
    model = qzo.load(tmp_path / "model", torch.float32)
    next(iter(layers_here(model))).scheme.group["strange"] = 3
    with pytest.raises(qzo.QzoError, match="does not take its config group: ") as caught:
        qzo.release(model)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(qzo.QzoError, match=r"pip install 'qzo\[compressed-tensors\]'"):
        qzo.release(model)


def layers_here(model):
    return [module for module in model.modules() if isinstance(module, CompressedLinear)]
