"""Damaged, contradictory and hostile folders: one clear line, exit code 2, nothing run, nothing large allocated."""

import json
import random
import sys

import pytest
import torch
from awq_files import write_awq
from mutations import configure, mutate, refused_of
from safetensors.torch import load_file, save_file

from qzo import QzoError, load, quantize
from qzo.checkpoints.save import save
from qzo.commands.main import main

KINDS = ("gptq", "awq", "plain")
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make_folder(make_model, tmp_path):
    """`make_folder(kind)`: a checkpoint with group size 32."""

    def make(kind):
        folder, model = tmp_path / kind, make_model(dtype=torch.bfloat16)
        if kind == "awq":
            return write_awq(model, folder)
        if kind == "gptq":
            save(quantize(model, 4, 32), folder)
        else:
            model.save_pretrained(folder)
        return folder

    return make


def put(folder, **parts):
    """Replace tensors of one layer."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{Q_PROJ}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Two shards with an index; returns the second."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model-2.safetensors"


def cut_shard(folder):
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-64])


def lost_shard(folder):
    shard(folder).unlink()


def pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_in_index(folder):
    shard(folder).rename(folder / "model-2.bin")
    index = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(index.replace("model-2.safetensors", "model-2.bin"))


def int_tensor(*shape):
    return torch.zeros(shape, dtype=torch.int32)


EVERYWHERE = {
    "model-2.safetensors is damaged": cut_shard,
    "names model-2.safetensors, which is not a file": lost_shard,
    "pytorch_model.bin is a pickle, which can run code": pickle,
    "names model-2.bin; only safetensors files are read": pickle_in_index,
    "config.json has num_hidden_layers=1000000000, but": lambda folder: configure(
        folder, lambda config: config.update(num_hidden_layers=10**9)
    ),
    "weights, but the files hold": lambda folder: configure(
        folder, lambda config: config.update(intermediate_size=10**9)
    ),
    "config.json cannot be read": lambda folder: (folder / "config.json").write_text("[" * 100_000),
}
GPTQ = {
    "qzeros is I32 (2, 9), but": lambda folder: put(folder, qzeros=int_tensor(2, 9)),
    "qweight is I64 (8, 64), but": lambda folder: put(folder, qweight=int_tensor(8, 64).long()),
    "g_idx has values outside 0 ... 1": lambda folder: put(folder, g_idx=int_tensor(64) + 2),
    "g_idx has values outside 0 ... 1 ": lambda folder: put(folder, g_idx=int_tensor(64) - 1),
    "g_idx is F32": lambda folder: put(folder, g_idx=torch.zeros(64)),
    "qweight is I32 (20, 64), but config.json implies I32 (15, 64)": lambda folder: configure(
        folder, lambda config: config["quantization_config"].update(bits=3)
    ),
    "whole numbers bits and group_size": lambda folder: configure(
        folder, lambda config: config["quantization_config"].update(bits=4.5)
    ),
    "whole numbers bits and group_size ": lambda folder: configure(
        folder, lambda config: config["quantization_config"].update(group_size=float("inf"))
    ),
    "but config.json implies": lambda folder: configure(
        folder, lambda config: config["quantization_config"].update(group_size=7)
    ),
    "quantization_config in config.json is not a JSON object": lambda folder: configure(
        folder, lambda config: config.update(quantization_config="gptq")
    ),
}
AWQ = {
    "qzeros is I32 (2, 9), but": lambda folder: put(folder, qzeros=int_tensor(2, 9)),
    "qweight is I32 (8, 64), but": lambda folder: put(folder, qweight=int_tensor(8, 64)),
    "scales is I32 (2, 64), but": lambda folder: put(folder, scales=int_tensor(2, 64)),
    "qzeros is I32 (5, 8), but config.json implies I32 (10, 8)": lambda folder: configure(
        folder, lambda config: config["quantization_config"].update(group_size=16)
    ),
}
CASES = [(kind, message, damage) for kind in KINDS for message, damage in EVERYWHERE.items()]
CASES += [("gptq", message, damage) for message, damage in GPTQ.items()]
CASES += [("awq", message, damage) for message, damage in AWQ.items()]


@pytest.mark.parametrize(
    ("kind", "message", "damage"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_damage_is_told_in_one_line_with_exit_code_two(make_folder, tmp_path, capsys, kind, message, damage):
    folder = make_folder(kind)
    damage(folder)
    with pytest.raises(QzoError) as caught:
        load(folder)
    assert message.strip() in str(caught.value) and "\n" not in str(caught.value)
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--group-size", "32"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {caught.value}"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_code_of_a_checkpoint_is_never_run(make_folder, input_ids, kind):
    folder = make_folder(kind)
    expected = load(folder)(input_ids).logits
    marker = folder / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    own = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_own.Own")
    configure(folder, lambda config: config.update(auto_map=own))
    assert torch.equal(load(folder)(input_ids).logits, expected)  # a known architecture needs none of it
    configure(folder, lambda config: config.update(model_type="own"))
    with pytest.raises(
        QzoError, match=r'own \(auto_map\), which is never run, and model_type="own" is not one'
    ) as error:
        load(folder)
    assert "\n" not in str(error.value) and not marker.exists() and "modeling_own" not in sys.modules


@pytest.mark.parametrize("quantized", [True, False])
def test_a_billion_experts_are_refused_before_they_are_built(make_model, tmp_path, quantized):
    model = make_model("mixtral", torch.bfloat16)
    if quantized:
        save(quantize(model, 4, 32), tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model")
    load(tmp_path / "model")
    configure(tmp_path / "model", lambda config: config.update(num_local_experts=10**9))
    with pytest.raises(QzoError, match="weights, but the files hold"):
        load(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_of_header_and_configuration_never_crash(make_folder, input_ids, kind):
    folder, dice = make_folder(kind), random.Random(kind)
    assert 100 < refused_of(folder, 200, lambda _: mutate(folder, dice), load) < 200
