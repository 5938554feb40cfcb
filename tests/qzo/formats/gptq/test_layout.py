"""The GPTQ layout against a second reader and writer, made of NumPy and loops, that share no code with the package."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import GPTQConfig

from qzo import QZO, load, quantize, scales
from qzo.checkpoints.save import save

ORDERS = [(False, False), (True, False), (True, True)]


def read_fields(words, count, n_bits):
    """Row r of `count` rows from 32-bit words, lowest bits first."""
    words, per_word = words.view(np.uint32), 32 // n_bits
    return np.stack([(words[r // per_word] >> (n_bits * (r % per_word))) & (2**n_bits - 1) for r in range(count)])


def write_fields(rows, n_bits):
    per_word = 32 // n_bits
    words = np.zeros((len(rows) // per_word, rows.shape[1]), np.uint32)
    for r, row in enumerate(rows):
        words[r // per_word] |= row.astype(np.uint32) << np.uint32(n_bits * (r % per_word))
    return words.view(np.int32)


def decode(tensors, path, n_bits, checkpoint_format):
    """The weight [N, K] as other readers of the layout rebuild it."""
    g_idx, scale = tensors[f"{path}.g_idx"], tensors[f"{path}.scales"].astype(np.float32)
    codes = read_fields(tensors[f"{path}.qweight"], len(g_idx), n_bits)
    qzeros = np.ascontiguousarray(tensors[f"{path}.qzeros"].T)
    zeros = read_fields(qzeros, scale.shape[1], n_bits).T + (1 if checkpoint_format == "gptq" else 0)
    weight = np.stack([(codes[k].astype(np.int64) - zeros[g]) * scale[g] for k, g in enumerate(g_idx)])
    return torch.from_numpy(weight.T.astype(np.float32))


def numpy_tensors(file):
    """bf16 tensors, which NumPy lacks, as fp32."""
    from safetensors.torch import load_file as load_torch

    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in load_torch(file).items()
    }


def plain_model(folder):
    """The checkpoint as an ordinary bf16 transformers model."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tensors = numpy_tensors(folder / "model.safetensors")
    weights = {}
    for name, value in tensors.items():
        path, _, part = name.rpartition(".")
        if part == "qweight":
            weight = decode(tensors, path, settings["bits"], settings["checkpoint_format"])
            conv1d = type(model.get_submodule(path)).__name__ == "Conv1D"
            weights[f"{path}.weight"] = weight.t().contiguous() if conv1d else weight
        elif part not in ("qzeros", "scales", "g_idx"):
            weights[name] = torch.from_numpy(value)
    report = model.load_state_dict({name: weight.bfloat16() for name, weight in weights.items()}, strict=False)
    model.tie_weights()
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}
    return model


def batches():
    return [torch.randint(5, 96, (8, 24)) for _ in range(2)]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ORDERS)
def test_plain_transformers_gives_the_logits_of_a_tuned_export(
    make_model, input_ids, tmp_path, family, checkpoint_format, order
):
    act_order, static_groups = order
    save(
        quantize(
            make_model(family, torch.bfloat16),
            4,
            16,
            method="gptq",
            calibration=batches(),
            act_order=act_order,
            static_groups=static_groups,
        ),
        tmp_path / "original",
        checkpoint_format=checkpoint_format,
    )
    digest = hashlib.sha256((tmp_path / "original/model.safetensors").read_bytes()).digest()
    tuned = load(tmp_path / "original")
    optimizer = QZO(scales(tuned), lr=1e-4, eps=1e-4)
    for _ in range(3):
        optimizer.step(lambda: tuned(input_ids, labels=input_ids).loss)
    save(tuned, tmp_path / "tuned", checkpoint_format=checkpoint_format)
    logits = tuned(input_ids).logits.float()
    torch.testing.assert_close(plain_model(tmp_path / "tuned")(input_ids).logits.float(), logits, rtol=0, atol=1e-2)
    assert (logits - load(tmp_path / "original")(input_ids).logits.float()).abs().max() > 0
    assert hashlib.sha256((tmp_path / "original/model.safetensors").read_bytes()).digest() == digest


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_is_decoded_to_the_bit(make_model, tmp_path, n_bits, symmetric):
    model = quantize(make_model(), n_bits, 32, symmetric, method="gptq", calibration=batches(), act_order=True)
    save(model, tmp_path / "model", checkpoint_format="gptq_v2")
    tensors = numpy_tensors(tmp_path / "model/model.safetensors")
    for name in scales(model):
        path = name.removesuffix(".scales")
        assert torch.equal(decode(tensors, path, n_bits, "gptq_v2"), model.get_submodule(path).dequantize())


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ORDERS)
def test_metadata_is_what_transformers_and_gptq_software_expect(make_model, tmp_path, checkpoint_format, order):
    act_order, static_groups = order
    model = quantize(
        make_model("opt", torch.bfloat16),
        4,
        16,
        method="gptq",
        calibration=batches(),
        act_order=act_order,
        static_groups=static_groups,
    )
    save(model, tmp_path / "model", checkpoint_format=checkpoint_format)
    settings = json.loads((tmp_path / "model/quantize_config.json").read_text())
    understood = GPTQConfig.from_dict({**settings, "act_group_aware": False})
    assert (understood.bits, understood.group_size, understood.sym) == (4, 16, True)
    assert understood.desc_act == (act_order and not static_groups) and understood.format == checkpoint_format
    tensors = numpy_tensors(tmp_path / "model/model.safetensors")
    path = "model.decoder.layers.1.fc1"
    parts = {name.rpartition(".")[2]: (t.dtype, t.shape) for name, t in tensors.items() if name.startswith(path)}
    assert parts == {
        "qweight": (np.int32, (8, 96)),
        "qzeros": (np.int32, (4, 12)),
        "scales": (np.float16, (4, 96)),
        "g_idx": (np.int32, (64,)),
        "bias": (np.float32, (96,)),  # bf16 in the file
    }


@pytest.mark.parametrize("settings", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_other_software_are_read(make_model, input_ids, tmp_path, settings, version):
    """As AutoGPTQ lays them out: a file name of its own, biases of zero everywhere, act-order."""
    model, generator = make_model("llama"), np.random.default_rng(0)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for path, layer in model.model.named_modules(prefix="model"):
        if type(layer) is not torch.nn.Linear:
            continue
        rows, columns = layer.weight.shape
        codes, zeros = generator.integers(0, 16, (columns, rows)), generator.integers(1, 16, (columns // 16, rows))
        scale = generator.uniform(0.001, 0.01, zeros.shape).astype(np.float16)
        g_idx = generator.permutation(columns).astype(np.int32) // 16
        layer.weight.data = torch.from_numpy((codes - zeros[g_idx]) * scale.astype(np.float32)[g_idx]).float().t()
        stored = zeros - 1 if version == 1 else zeros
        tensors |= {
            f"{path}.qweight": write_fields(codes, 4),
            f"{path}.qzeros": np.ascontiguousarray(write_fields(np.ascontiguousarray(stored.T), 4).T),
            f"{path}.scales": scale,
            f"{path}.g_idx": g_idx,
            f"{path}.bias": np.zeros(rows, np.float16),
        }
        del tensors[f"{path}.weight"]
    tmp_path.joinpath("other").mkdir()
    save_file(tensors, tmp_path / "other/gptq_model-4bit-16g.safetensors", {"format": "pt"})
    quantization = {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    config = json.loads(model.config.to_json_string())
    if settings == "config.json":
        config["quantization_config"] = {**quantization, "method": "gptq", "format": ["gptq", "gptq_v2"][version - 1]}
    else:
        names = {} if version == 1 else {"checkpoint_format": "gptq_v2"}
        (tmp_path / "other/quantize_config.json").write_text(json.dumps(quantization | names))
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    found = load(tmp_path / "other", torch.float32)
    torch.testing.assert_close(found(input_ids).logits, model(input_ids).logits, rtol=1e-4, atol=1e-5)
