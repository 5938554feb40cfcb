"""AWQ checkpoints as they are published: a quantized head, experts one by one."""

import json
import re

import torch
from awq_files import awq_tensors, slow_weight, write_awq
from published import publish
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.formats.awq.layer import AwqLinear


def test_a_quantized_head_is_a_layer_like_others(make_model, tmp_path, input_ids):
    reference = make_model()
    folder = write_awq(reference, tmp_path / "came")
    tensors = load_file(folder / "model.safetensors")
    tensors |= awq_tensors(tensors.pop("lm_head.weight"), "lm_head", 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert inspect(folder).reason is None
    model = qzo.load(folder, torch.float32)
    assert isinstance(model.lm_head, AwqLinear) and len(qzo.scales(model)) == 15
    assert torch.equal(model.lm_head.dequantize(), slow_weight(tensors, "lm_head"))
    qzo.scales(model)["lm_head.scales"].mul_(1.25)
    qzo.save(model, tmp_path / "saved")
    new = load_file(tmp_path / "saved/model.safetensors")
    assert {name for name, value in tensors.items() if not torch.equal(value, new[name])} == {"lm_head.scales"}


def test_experts_are_read_one_by_one(tmp_path, input_ids):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads), dtype=torch.float32).eval()
    reference, folder = publish(model, tmp_path / "came", lambda path: None), tmp_path / "came"
    tensors = load_file(folder / "model.safetensors")
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name in [name for name in tensors if re.search(r"experts\.\d+\.\w+\.weight$", name)]:
        path, _, last = name.removesuffix(".weight").rpartition(".")
        stored = f"{path.replace('.mlp.', '.block_sparse_moe.')}.{words[last]}"
        tensors |= awq_tensors(tensors.pop(name), stored, 32)
        experts, number = reference.get_submodule(path.rpartition(".")[0]), int(path.rpartition(".")[2])
        half = slice(64, 128) if last == "up_proj" else slice(0, 64)
        stack = experts.down_proj if last == "down_proj" else experts.gate_up_proj
        stack.data[number, half] = slow_weight(tensors, stored)
    save_file(
        {name.replace(".mlp.gate", ".block_sparse_moe.gate"): value for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).reason is None
    found = qzo.load(folder, torch.float32)
    assert len(qzo.scales(found)) == 6
    torch.testing.assert_close(found(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
