"""torchao: every kind of weight against the library and PyTorch's int4 operator, taken over and given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qzo
from qzo.formats.torchao import library
from qzo.formats.torchao.codes import unpacked, words_shape
from qzo.formats.torchao.layer import AoInt4Linear, AoInt8Linear

pytest.importorskip("torchao", reason="needs torchao")
from cases_torchao import int4_product, int4_tensor, linear_layers, options
from safetensors.torch import load_file, save_file
from tiny_models import write_plain
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization import (
    Int4TilePackedTo4dTensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerTensor,
    quantize_,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

CONFIGS = {
    "row": Int8WeightOnlyConfig(),
    "group": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "asymmetric": IntxWeightOnlyConfig(
        weight_dtype=torch.int3, granularity=PerGroup(16), mapping_type=MappingType.ASYMMETRIC
    ),
}


def holding(weight: torch.Tensor) -> nn.Sequential:
    """A model whose only layer has this weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(linear)


def tiles_of(codes: torch.Tensor) -> torch.Tensor:
    """Codes q + 8 [N, K] in the order of the tensor cores, number by number from its definition."""
    rows, columns = codes.shape
    words = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int64)
    for n in range(rows):
        for k in range(columns):
            tile, within = divmod(k, 128)
            word, within = divmod(within, 32)  # two tiles of 16 columns
            half, within = divmod(within, 16)
            eight, within = divmod(within, 8)
            lane = n % 8 * 4 + within // 2
            place = (half * 2 + eight) + 4 * (within % 2)  # odd columns in the upper half
            words[n // 8, tile, lane, word] |= int(codes[n, k]) << 4 * place
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_those_of_the_library(kind, dtype):
    model = nn.Sequential(nn.Linear(96, 64, dtype=dtype))
    quantize_(model, CONFIGS[kind])
    weight = model[0].weight
    expected, scales, x = weight.dequantize().float(), weight.scale.clone(), torch.randn(3, 96, dtype=dtype)
    y = model(x).detach()
    layer = qzo.adopt(model)[0]
    assert isinstance(layer, AoInt8Linear) and layer.codes.data_ptr() == weight.qdata.data_ptr()
    assert layer.scales.data_ptr() == weight.scale.data_ptr() and torch.equal(qzo.scales(model)["0.scales"], scales)
    tolerance = 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert (layer.dequantize() - expected).abs().max() <= tolerance
    torch.testing.assert_close(layer._rows(5, 42, torch.float32, layer.scales), layer.dequantize()[5:42])
    assert (layer(x) - y).abs().max() <= 100 * torch.finfo(dtype).eps
    with torch.no_grad():
        layer.scales.mul_(1.5)
        y = layer(x)
    linear = qzo.release(model)[0]
    assert type(linear.weight) is type(weight) and linear.weight.dtype == dtype
    assert linear.weight.qdata.data_ptr() == weight.qdata.data_ptr()
    assert (linear(x) - y).abs().max() <= 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 160])
def test_codes_of_the_cpu_operator_are_found_in_its_blocks(rows):
    codes = torch.randint(0, 16, (rows, 64), dtype=torch.int32)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for start, stop in ((0, rows), (3, 11), (rows - 1, rows), (rows // 2 - 3, rows // 2 + 5)):
        assert torch.equal(unpacked(words, "cpu", start, stop), codes[start:stop] - 8.0)


def test_codes_of_the_tensor_cores_are_found_in_their_tiles():
    codes = torch.randint(0, 16, (24, 256), dtype=torch.int32)
    words = tiles_of(codes)
    assert tuple(words.shape) == words_shape("tiles", 24, 256)
    for start, stop in ((0, 24), (3, 11), (23, 24)):
        assert torch.equal(unpacked(words, "tiles", start, stop), codes[start:stop] - 8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_int4_operator_of_the_cpu_computes_what_the_layer_does(dtype):
    weight = Int4OpaqueTensor.from_hp(torch.randn(80, 96, dtype=dtype), [1, 32])
    model, x = holding(weight), torch.randn(3, 96, dtype=dtype)
    model[0].bias.data = model[0].bias.to(dtype)
    y = model(x).detach()
    layer = qzo.adopt(model)[0]
    assert isinstance(layer, AoInt4Linear) and layer.codes.data_ptr() == weight.qdata.data_ptr()
    torch.testing.assert_close(layer(x), y, rtol=0.02, atol=4 * torch.finfo(dtype).eps * float(y.abs().max()))
    with torch.no_grad():
        layer.scales.mul_(1.25)
        layer.offsets.mul_(1.25)
        changed = layer(x)
    linear = qzo.release(model)[0]
    assert type(linear.weight) is Int4OpaqueTensor and not torch.equal(changed, y)
    torch.testing.assert_close(linear(x), changed, rtol=0.02, atol=4 * torch.finfo(dtype).eps * float(y.abs().max()))


def test_plain_int4_weights_are_those_of_the_int4_operator():
    weight = int4_tensor(torch.randn(64, 96))
    model, x = holding(weight), torch.randn(3, 96)
    expected = int4_product(weight, x)
    layer = qzo.adopt(model)[0]
    torch.testing.assert_close(layer(x) - layer.bias, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.scales.mul_(1.25)
    again = qzo.release(model)[0].weight
    assert type(again) is type(weight) and torch.equal(again.qdata, weight.qdata) and again.shape == weight.shape
    assert not torch.equal(int4_product(again, x), expected)


def test_tiles_with_padding_compute_the_weight_of_their_definition():
    shape, padded, size = (60, 200), (64, 1024), 32
    codes = torch.randint(0, 16, padded, dtype=torch.int32)
    both = torch.randn(padded[1] // size, padded[0], 2).abs()
    weight = Int4TilePackedTo4dTensor(tiles_of(codes), both, [1, size], torch.Size((60, 192)))
    layer = qzo.adopt(holding(weight))[0]
    scale, zero = (part.t().repeat_interleave(size, 1) for part in both.unbind(-1))
    assert torch.allclose(layer.dequantize(), ((codes - 8) * scale + zero)[:60, :192], rtol=1e-5, atol=1e-5)
    with pytest.raises(qzo.QzoError, match="which does not divide"):
        qzo.adopt(holding(Int4TilePackedTo4dTensor(tiles_of(codes), both, [1, size], torch.Size((*shape[:1], 201)))))


def test_offsets_follow_their_scales_and_weights_move_as_a_whole():
    model = qzo.adopt(holding(int4_tensor(torch.randn(64, 96))))
    before = model[0].dequantize()
    optimizer = qzo.QZO(qzo.trainable(model, "scales+offsets"), lr=0.1, relative=True, clip_threshold=None)
    optimizer.step(lambda: model(torch.ones(1, 96)).square().mean())
    share = (model[0].dequantize() / before).unflatten(1, (-1, 32))
    assert (share.std(dim=2) < 1e-3).all() and (share - 1).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["int8", "intx4"])
def test_models_of_transformers_are_taken_over_trained_and_given_back(kind, tmp_path):
    plain = write_plain("llama", tmp_path / "plain")
    config = TorchAoConfig(options(kind))
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    ids = torch.randint(5, 96, (2, 12))
    qzo.adopt(model)
    with torch.no_grad():
        before = float(model(ids, labels=ids).loss)
        assert qzo.check_live(model, lambda: model(ids, labels=ids).loss)
        optimizer = qzo.QZO(qzo.scales(model), lr=2e-2, relative=True, clip_threshold=None)
        for _ in range(30):
            optimizer.step(lambda: model(ids, labels=ids).loss)
        trained = float(model(ids, labels=ids).loss)
        assert trained < before - 0.02 and len(linear_layers(qzo.release(model))) == 14
        assert float(model(ids, labels=ids).loss) == pytest.approx(trained, abs=1e-4)
    model.save_pretrained(tmp_path / "out")
    again = qzo.load(tmp_path / "out", torch.float32)
    assert float(again(ids, labels=ids).loss) == pytest.approx(trained, abs=1e-4)
    assert len(linear_layers(qzo.release(again))) == 14
    assert float(again(ids, labels=ids).loss) == pytest.approx(trained, abs=1e-4)


@pytest.mark.parametrize("tuned", ["scales", "scales+offsets"])
def test_scales_and_offsets_in_one_tensor_of_a_file_are_written_back(tmp_path, tuned):
    """A checkpoint in the order of the tensor cores, as transformers saves one that was quantized on a GPU."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    plain = AutoModelForCausalLM.from_pretrained(write_plain("llama", tmp_path / "plain"), dtype=torch.float32)
    state = dict(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        if name.endswith("proj.weight"):
            rows, columns = tensor.shape
            codes = torch.randint(0, 16, (rows, -(-columns // 1024) * 1024), dtype=torch.int32)
            words = torch.randint(-(2**31), 2**31, words_shape("tiles", *codes.shape)).to(torch.int32)
            both = torch.stack((torch.rand(codes.shape[1] // 32, rows), torch.randn(codes.shape[1] // 32, rows)), -1)
            both = (both / 50).bfloat16()
            state[name] = Int4TilePackedTo4dTensor(words, both, [1, 32], tensor.shape)
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {**metadata, "format": "pt"})
    config = plain.config
    config.quantization_config = {"quant_method": "torchao", "quant_type": {"default": {}}}
    config.to_json_file(tmp_path / "plain" / "config.json")
    model = qzo.load(tmp_path / "plain", torch.float32)
    sets = qzo.trainable(model, follow=tuned == "scales+offsets")
    optimizer = qzo.QZO(sets, lr=0.1, relative=True, clip_threshold=None)
    ids = torch.randint(5, 96, (2, 12))
    optimizer.step(lambda: model(ids, labels=ids).loss)
    parts = {
        f"{path}.{part}": getattr(model.get_submodule(path), part)
        for path in qzo_paths(model)
        for part in tuned.split("+")
    }
    (tmp_path / "run").mkdir()
    save_file(parts, tmp_path / "run" / "trained.safetensors", {"model": str(tmp_path / "plain")})
    qzo.export(tmp_path / "run", tmp_path / "out")
    torch.testing.assert_close(qzo.load(tmp_path / "out", torch.float32)(ids).logits, model(ids).logits)
    new = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj._weight_"
    assert torch.equal(new[f"{name}qdata"], tensors[f"{name}qdata"])
    for place, same in ((0, False), (1, tuned == "scales")):
        assert (
            torch.equal(new[f"{name}scale_and_zero"][..., place], tensors[f"{name}scale_and_zero"][..., place]) == same
        )


def qzo_paths(model: nn.Module) -> list[str]:
    return [name.removesuffix(".scales") for name in qzo.scales(model)]


def test_what_changes_inputs_too_and_unknown_kinds_are_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(qzo.QzoError, match=r"^0: the Int8Tensor changes its inputs too \(act_quant_kwargs\)"):
        qzo.adopt(model)
    from torchao.quantization import Float8WeightOnlyConfig

    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    quantize_(model, Float8WeightOnlyConfig())
    with pytest.raises(qzo.QzoError, match="a weight of torchao's kind Float8Tensor cannot be trained"):
        qzo.adopt(model)


def test_layers_from_weights_and_on_meta():
    weight = torch.randn(64, 96)
    for quantize, size in ((library.quantize, -1), (library.quantize, 32), (AoInt4Linear.from_weight, 32)):
        layer = quantize(weight, group_size=size)
        empty = quantize(weight.to("meta"), group_size=size)
        assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == {
            name: (t.shape, t.dtype) for name, t in empty.state_dict().items()
        }
        assert (layer.dequantize() - weight).abs().max() < 0.51 * layer.scales.max()  # half a step
    expected = int4_tensor(weight)
    assert torch.equal(layer.codes, expected.qdata) and torch.equal(layer.scales, expected.scale)
