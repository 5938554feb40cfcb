"""HQQ: every layout against the library, modules taken over and given back, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qzo
from qzo.formats.hqq.codes import HqqLayout
from qzo.formats.hqq.layer import HqqLinear
from qzo.formats.hqq.library import quantize, release
from qzo.kernels import rebuilt as chunked
from qzo.kernels.rebuilt import chunk_bounds

pytest.importorskip("hqq", reason="needs hqq")
from cases_hqq import layers_of, quantized, read, write
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from tiny_models import write_plain

ALL_BITS = (1, 1.58, 2, 3, 4, 5, 6, 8)


def library_layer(n_bits=4, group_size=32, axis=1, dtype=torch.float32, shape=(64, 96), **options) -> HQQLinear:
    linear = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    config = BaseQuantizeConfig(nbits=n_bits, group_size=group_size, axis=axis, **options)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


def nested_layer(weight: torch.Tensor, group_size: int | None = None) -> HQQLinear:
    """A layer whose scales and zero points are quantized themselves, as old versions of the library made it."""
    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    layer.quant_config = {"scale_quant_params": None, "zero_quant_params": None}
    config = {"nbits": 8, "channel_wise": group_size is not None, "group_size": group_size, "optimize": False}
    whole = {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False}
    layer.quantize(weight, {"nbits": 4, "group_size": 32, "axis": 1}, config, whole)
    return layer


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("n_bits", ALL_BITS)
@pytest.mark.parametrize("view_as_float", [False, True])
def test_any_rows_of_any_layout_are_those_of_the_library(n_bits, axis, view_as_float, monkeypatch):
    for group_size in (32, 64, None):
        library = library_layer(n_bits, group_size, axis, view_as_float=view_as_float)
        expected, words = library.dequantize(), library.W_q.clone()
        layer = qzo.adopt(nn.Sequential(library))[0]
        assert isinstance(layer, HqqLinear) and layer.codes.data_ptr() == library.W_q.data_ptr()
        assert layer.scales.data_ptr() == library.meta["scale"].data_ptr()
        for start, stop in ((0, 64), (0, 1), (7, 8), (5, 42), (63, 64)):
            assert torch.equal(layer._rows(start, stop, torch.float32, layer.scales), expected[start:stop])
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 500)
        assert len(chunk_bounds(64, 96)) > 5 and torch.equal(layer.dequantize(), expected)
        x = torch.randn(3, 96)
        torch.testing.assert_close(layer(x), library(x))
        assert release(layer) is library and library.W_q.dtype == words.dtype
        assert torch.equal(library.W_q.view(torch.uint8), words.view(torch.uint8))


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_that_run_over_the_ends_of_rows(axis):
    library = library_layer(8, 40, axis, shape=(10, 100))
    assert torch.equal(
        qzo.adopt(nn.Sequential(library))[0]._rows(3, 7, torch.float32, library.meta["scale"]),
        library.dequantize()[3:7],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_scales_stay_and_are_trained_as_they_are(dtype):
    library = library_layer(dtype=dtype)
    expected = library.dequantize()
    model = qzo.adopt(nn.Sequential(library))
    assert qzo.scales(model)["0.scales"].dtype == dtype
    error = (model[0].dequantize() - expected.float()).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_release_gives_the_very_module_back_with_the_new_scales():
    library = library_layer()
    library.name = "mine"
    model = nn.Sequential(library)
    before = library.dequantize()
    with torch.no_grad():
        qzo.scales(qzo.adopt(model))["0.scales"].mul_(1.5)
        expected = model[0].dequantize()
    assert qzo.release(model)[0] is library and library.name == "mine"
    assert torch.equal(library.dequantize(), expected) and not torch.equal(expected, before)
    torch.testing.assert_close(library(torch.eye(96)), expected.t() + library.bias)


def test_a_model_on_its_way_survives_copy_and_pickle():
    model = qzo.adopt(nn.Sequential(library_layer()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin[0].scales.mul_(2)
        twin = qzo.release(twin)
        torch.testing.assert_close(twin[0].dequantize(), 2 * model[0].dequantize())


def test_a_patched_forward_reads_the_new_scales_and_other_kernels_are_refused():
    from hqq.utils.patching import patch_hqq_inference

    library = patch_hqq_inference(library_layer(), None)
    model = qzo.adopt(nn.Sequential(library))
    with torch.no_grad():
        model[0].scales.mul_(3)
        expected = model[0](torch.eye(96))
    torch.testing.assert_close(qzo.release(model)[0](torch.eye(96)), expected)

    class HQQLinearTorchWeightOnlynt4(nn.Module):
        __module__ = "hqq.backends.torchao"

    library = library_layer()
    model = nn.Sequential(library, HQQLinearTorchWeightOnlynt4())
    with pytest.raises(
        qzo.QzoError, match=r"^1: a HQQLinearTorchWeightOnlynt4 keeps its scales .* before it is patched"
    ):
        qzo.adopt(model)
    assert model[0] is library


def test_a_module_without_codes_and_offloaded_scales_are_refused():
    empty = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    with pytest.raises(qzo.QzoError, match="holds no codes yet"):
        qzo.adopt(nn.Sequential(empty))
    library = library_layer()
    library.meta["zero_scale"] = torch.stack((library.meta.pop("zero"), library.meta.pop("scale")))
    with pytest.raises(qzo.QzoError, match='"scale"\\] is not a tensor; offloaded'):
        qzo.adopt(nn.Sequential(library))


@pytest.mark.parametrize("group_size", [128, None])
def test_nested_scales_are_unnested_and_nested_again(group_size):
    library = nested_layer(torch.randn(64, 512), group_size)
    before, zeros = library.dequantize(), library.meta["zero_q"].clone()
    model = qzo.adopt(nn.Sequential(library))
    torch.testing.assert_close(model[0].dequantize(), before, rtol=1e-6, atol=1e-7)
    start = model[0].scales.clone()
    qzo.release(model)
    torch.testing.assert_close(library.dequantize(), before, rtol=0.02, atol=1e-3)  # unchanged but for one rounding
    qzo.adopt(model)
    torch.testing.assert_close(model[0].scales, start, rtol=0.01, atol=1e-5)
    with torch.no_grad():
        model[0].scales.mul_(1.5)
    qzo.release(model)
    assert library.meta["quant_scale"] and "scale" not in library.meta
    assert torch.equal(library.meta["zero_q"], zeros)
    assert library.meta["scale_q"].aminmax() == (0, 255)  # all of the eight bits are used
    torch.testing.assert_close(library.dequantize(), 1.5 * before, rtol=0.02, atol=2e-3)


def test_old_files_with_nested_zero_points_are_read_and_written(tmp_path):
    """As on the hub: all settings in a dictionary `meta`, zero points and scales in 8 bits."""
    plain = write_plain("llama", tmp_path / "plain")
    write(plain, tmp_path / "old", nbits=4, group_size=32)
    state = torch.load(tmp_path / "old" / "qmodel.pt", weights_only=True)
    for path, about in state.items():
        if "W_q" in about:
            layer = nested_layer(torch.randn(about["shape"]) / 8)
            state[path] = {"W_q": layer.W_q.data, "meta": layer.meta, "bias": None}
    torch.save(state, tmp_path / "old" / "qmodel.pt")
    ids = torch.randint(5, 96, (2, 12))
    model = qzo.load(tmp_path / "old", torch.float32)
    torch.testing.assert_close(model(ids).logits, read(tmp_path / "old")(ids).logits, rtol=0, atol=1e-4)
    scales = {name: 1.5 * scale for name, scale in qzo.scales(model).items()}
    (tmp_path / "run").mkdir()
    save_file(scales, tmp_path / "run" / "trained.safetensors", {"model": str(tmp_path / "old")})
    qzo.export(tmp_path / "run", tmp_path / "new")
    for path, layer in layers_of(read(tmp_path / "new")).items():
        weight = model.get_submodule(path).dequantize()
        torch.testing.assert_close(layer.dequantize(), 1.5 * weight, rtol=0.02, atol=0.02 * float(weight.abs().max()))


def test_a_loaded_model_is_given_to_the_library(tmp_path):
    plain = write_plain("opt", tmp_path / "plain")
    write(plain, tmp_path / "model", nbits=3, group_size=32, axis=0, view_as_float=True)
    model = qzo.load(tmp_path / "model", torch.float32)
    ids = torch.randint(5, 96, (2, 12))
    expected = model(ids).logits
    assert len(layers_of(qzo.release(model))) == 12
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert "W_q" in model.model.decoder.layers[0].fc1.state_dict()


def test_adopted_models_train_and_are_live(tmp_path):
    model = quantized(write_plain("llama", tmp_path / "plain"), nbits=2, group_size=16, axis=0)
    ids = torch.randint(5, 96, (2, 12))
    with torch.no_grad():
        before = float(model(ids, labels=ids).loss)
        qzo.adopt(model)
        assert qzo.check_live(model, lambda: model(ids, labels=ids).loss)
        optimizer = qzo.QZO(qzo.scales(model), lr=2e-2, relative=True, clip_threshold=None)
        for _ in range(30):
            optimizer.step(lambda: model(ids, labels=ids).loss)
        trained = float(model(ids, labels=ids).loss)
        qzo.release(model)
        assert trained < before - 0.02
        assert float(model(ids, labels=ids).loss) == pytest.approx(trained, abs=1e-4)


def test_layers_from_weights_and_on_meta():
    weight = torch.randn(64, 96)
    for n_bits, axis in ((4, 1), (2, 0), (1.58, 1)):
        layer = quantize(weight, n_bits=n_bits, group_size=32, axis=axis)
        empty = quantize(weight.to("meta"), n_bits=n_bits, group_size=32, axis=axis)
        assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == {
            name: (t.shape, t.dtype) for name, t in empty.state_dict().items()
        }
    layer = quantize(weight, n_bits=8, group_size=32)
    assert (layer.dequantize() - weight).abs().max() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_bits": 7}, "n_bits=7 is not supported"),
        ({"axis": 2}, "axis=2 is not 0 or 1"),
        ({"group_size": 100}, "do not fill groups of 100"),
        ({"group_size": -1}, "must be positive"),
        ({"n_bits": 1, "group_size": 1024}, "do not fill words of 8 codes"),
    ],
)
def test_layouts_that_there_are_not(change, message):
    HqqLayout(96, 64, 4, 32, 1)
    with pytest.raises(qzo.QzoError, match=message):
        HqqLayout(96, 64, **{"n_bits": 4, "group_size": 32, "axis": 1, **change})
