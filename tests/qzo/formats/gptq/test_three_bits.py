"""GPTQ with 3 bits, whose codes lie across words, against a packer that knows only bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qzo import QZO, export, load, quantize, scales
from qzo.checkpoints.save import save
from qzo.commands.main import main
from qzo.errors import QzoError
from qzo.formats.gptq.codes import pack, pack_zeros, unpack, unpack_zeros, zeros_from_v1, zeros_to_v1
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.vocabulary import check_table
from qzo.kernels import rebuilt as chunked

Q_PROJ = "model.layers.0.self_attn.q_proj"


def slow_words(codes):
    """A list of codes -> words, through the string of all bits: bit i of the stream is bit i % 32 of word i // 32."""
    bits = "".join(format(code, "03b")[::-1] for code in codes)
    values = [int(bits[start : start + 32][::-1], 2) for start in range(0, len(bits), 32)]
    return [value - 2**32 if value >= 2**31 else value for value in values]


def slow_codes(words):
    bits = "".join(format(word % 2**32, "032b")[::-1] for word in words)
    return [int(bits[start : start + 3][::-1], 2) for start in range(0, len(bits), 3)]


def slow_weight(tensors, path, version):
    """[N, K] of a layer of a checkpoint, number by number."""
    part = {name: tensors[f"{path}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    codes = torch.tensor([slow_codes(column) for column in part["qweight"].t().tolist()])  # [N, K]
    zeros = torch.tensor([slow_codes(row) for row in part["qzeros"].tolist()]) + (version == "gptq")  # [K/g, N]
    group = part["g_idx"].long()
    return (codes - zeros[group].t()).float() * part["scales"].float()[group].t()


@pytest.mark.parametrize(("codes", "columns"), [(32, 5), (96, 8), (320, 1)])
def test_words_are_those_of_the_bit_stream(codes, columns):
    values = torch.randint(0, 8, (codes, columns), dtype=torch.uint8)
    words = pack(values, 3)
    assert words.dtype == torch.int32 and words.shape == (codes * 3 // 32, columns)
    assert words.t().tolist() == [slow_words(column) for column in values.t().tolist()]
    assert torch.equal(unpack(words, 3), values.int())
    assert torch.equal(unpack(words[:, :1], 3), values[:, :1].int())


@pytest.mark.parametrize("position", [9, 10, 11, 20, 21, 22, 31])
def test_every_bit_of_codes_at_the_borders_of_words(position):
    for code in range(8):
        values = torch.zeros(32, 1, dtype=torch.uint8)
        values[position] = code
        words = pack(values, 3)
        assert words.flatten().tolist() == slow_words(values.flatten().tolist())
        assert torch.equal(unpack(words, 3), values.int())


def test_all_ones_do_not_run_into_each_other():
    values = torch.full((32, 2), 7)
    assert (pack(values, 3) == -1).all() and torch.equal(unpack(pack(values, 3), 3), values.int())


def test_zero_points_are_packed_along_the_columns():
    zeros = torch.randint(1, 8, (3, 64))
    qzeros = pack_zeros(zeros, 3)
    assert qzeros.tolist() == [slow_words(row) for row in zeros.tolist()] and qzeros.is_contiguous()
    assert torch.equal(unpack_zeros(qzeros, 3), zeros.int())
    v1 = zeros_to_v1(qzeros, 3)
    assert v1.tolist() == [slow_words(row) for row in (zeros - 1).tolist()]
    assert torch.equal(zeros_from_v1(v1, 3), qzeros)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_forward_and_gradient_equal_the_dense_product(monkeypatch, act_order, symmetric):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * 96)  # chunks that end within a block of zero points
    weight, x = torch.randn(64, 96), torch.randn(2, 3, 96)
    layer = QuantLinear.from_weight(weight, torch.randn(64), 3, 32, symmetric)
    assert ((layer.dequantize() - weight).abs() <= layer.scales.repeat_interleave(32, 0).t() * 0.51).all()
    if act_order:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(96)])
        layer.read_layout()
    dense = slow_weight({f"x.{name}": buffer for name, buffer in layer.named_buffers()}, "x", "gptq_v2")
    assert torch.equal(layer.dequantize(), dense)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias), rtol=1e-5, atol=1e-4)
    layer.scales.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.scales)
    rows = nn.functional.linear(x, layer._rows(0, 64, torch.float32, layer.scales), layer.bias)
    (expected,) = torch.autograd.grad(rows.square().sum(), layer.scales)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)


def test_exact_bytes_and_meta():
    layer = QuantLinear.from_weight(torch.randn(256, 512).bfloat16(), None, 3, 128)
    sizes = {name: buffer.nbytes for name, buffer in layer.named_buffers()}
    groups = 512 // 128
    assert sizes == {
        "qweight": 256 * 512 * 3 // 8,
        "qzeros": groups * 256 * 3 // 8,
        "scales": groups * 256 * 2,
        "g_idx": 2048,
    }
    meta = QuantLinear.from_weight(torch.empty(256, 512, device="meta", dtype=torch.bfloat16), None, 3, 128)
    assert {name: buffer.nbytes for name, buffer in meta.named_buffers()} == sizes
    y = meta(torch.empty(2, 512, device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (2, 256)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_sizes_that_do_not_fill_three_words_are_refused(shape):
    with pytest.raises(QzoError, match="is not a multiple of 32, the number of 3-bit codes in 3 int32"):
        QuantLinear.from_weight(torch.randn(shape), n_bits=3, group_size=16)
    with pytest.raises(QzoError, match="multiple of 32"):
        pack(torch.zeros(48, 4, dtype=torch.uint8), 3)
    with pytest.raises(QzoError, match="use 8 bits"):
        check_table(64, 3, 16)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_checkpoint_is_written_read_trained_and_written_back(make_model, tmp_path, version, method):
    text = [torch.randint(5, 96, (8, 24))] if method == "gptq" else None
    model = quantize(make_model(), 3, 32, method=method, calibration=text)
    save(model, tmp_path / "model", checkpoint_format=version)
    raw = load_file(tmp_path / "model/model.safetensors")
    assert raw[f"{Q_PROJ}.qweight"].shape == (6, 64) and raw[f"{Q_PROJ}.qzeros"].shape == (2, 6)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    tuned = load(tmp_path / "model", torch.float32)
    for name in scales(tuned):
        path = name.removesuffix(".scales")
        assert torch.equal(tuned.get_submodule(path).dequantize(), slow_weight(raw, path, version))
    assert sum(scale.numel() for scale in scales(tuned).values()) * 32 == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160)
    input_ids = torch.randint(5, 96, (8, 24))
    optimizer = QZO(scales(tuned), lr=1e-5, eps=1e-4)
    losses = [optimizer.step(lambda: tuned(input_ids, labels=input_ids).loss) for _ in range(50)]
    assert losses[-1] < losses[0]
    save(tuned, tmp_path / "tuned", checkpoint_format=version)
    again = load(tmp_path / "tuned", torch.float32)
    new = load_file(tmp_path / "tuned/model.safetensors")
    assert all(torch.equal(new[name], raw[name]) for name in raw if not name.endswith(".scales"))
    assert torch.equal(again(input_ids).logits, tuned(input_ids).logits)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


def test_the_command_quantizes_and_exports_three_bits(make_model, tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    command = ["quantize", str(tmp_path / "plain"), str(tmp_path / "out"), "--bits", "3", "--group-size", "32"]
    assert main(command) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["bits"] == 3
    export(tmp_path / "out", tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
