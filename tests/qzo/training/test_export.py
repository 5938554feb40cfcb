"""`qzo export`: tuned tensors in the checkpoint they came from, the original untouched."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import standin
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qzo
from qzo import QzoError, export, load, scales
from qzo.checkpoints.load import load_tokenizer
from qzo.commands.main import main
from qzo.training.task import put_best


def files(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture
def make_run(make_model, tmp_path, monkeypatch):
    """`make_run(method, *options)`: a run of eight steps on a model folder; returns both folders."""
    task = standin.module()
    monkeypatch.setitem(sys.modules, "qzo.tasks", task)
    accuracies = iter([0.0, 0.1, 0.2, 0.9, 0.3, 0.3, 0.3])  # the best is neither the first state nor the last
    task.evaluate = lambda *_, **__: {"accuracy": next(accuracies), "loss": 1.0, "count": 1}

    def make(method="qzo", checkpoint_format="gptq_v2", lr="1e-4"):
        model = make_model(dtype=torch.bfloat16, tied=method == "ft")
        quantized = method in ("qzo", "qlora")
        folder = standin.write_model(model, tmp_path / "model", quantized, checkpoint_format)
        (folder / "README.md").write_text("a model")
        command = ["train", str(folder), *standin.PAPER, "--method", method, "--steps", "8", "--batch-size", "4"]
        assert main([*command, "--lr", lr, "--eval-every", "2", "--out", str(tmp_path / "run")]) == 0
        return folder, tmp_path / "run"

    return make


@pytest.mark.parametrize("state", ["best", "last"])
def test_a_tuned_checkpoint_gives_the_same_logits_and_the_source_is_untouched(make_run, input_ids, tmp_path, state):
    source, run = make_run()
    before = files(source)
    assert main(["export", str(run), str(tmp_path / "out"), "--state", state]) == 0
    assert files(source) == before
    tuned = load(source)
    if state == "best":
        put_best(tuned, run)
    else:
        qzo.replay(tuned, run / "run.journal")
    exported, plain = load(tmp_path / "out"), load(source)
    with torch.no_grad():
        logits = exported(input_ids).logits
        assert torch.equal(logits, tuned(input_ids).logits) and not torch.equal(logits, plain(input_ids).logits)
    after = files(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}


def test_the_best_state_is_another_than_the_last(make_run, tmp_path):
    _, run = make_run()
    for state in ("best", "last"):
        export(run, tmp_path / state, state)
    best, last = (scales(load(tmp_path / state)) for state in ("best", "last"))
    assert json.loads((run / "result.json").read_text())["best_step"] == 4
    assert all(not torch.equal(best[name], last[name]) for name in best)


def test_only_scales_change_and_every_tensor_keeps_its_dtype(make_run, tmp_path):
    source, run = make_run(checkpoint_format="gptq")
    export(run, tmp_path / "out")
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {name: tensor.dtype for name, tensor in old.items()} == {name: tensor.dtype for name, tensor in new.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.endswith(".scales")}
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_plain_code_reads_an_exported_checkpoint(make_run, input_ids, tmp_path):
    """Dequantized here from the layout's definition (v1: stored zero points are one less), in transformers' model."""
    _, run = make_run(checkpoint_format="gptq")
    export(run, tmp_path / "out")
    raw = load_file(tmp_path / "out/model.safetensors")
    state = {}
    for name, tensor in raw.items():
        path, _, part = name.rpartition(".")
        if part == "qweight":
            shifts = torch.arange(0, 32, 4)
            codes = (tensor[:, None, :] >> shifts[None, :, None] & 15).flatten(0, 1)  # [K, N]
            zeros = (raw[f"{path}.qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1  # [K/g, N]
            group = raw[f"{path}.g_idx"].long()
            weight = (codes - zeros[group]).float() * raw[f"{path}.scales"][group].float()
            state[f"{path}.weight"] = weight.t().to(torch.bfloat16)
        elif part not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor
    config = json.loads((tmp_path / "out/config.json").read_text())
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        difference = model(input_ids).logits - load(tmp_path / "out")(input_ids).logits
    assert difference.abs().max() < 1e-2


def test_shards_and_their_index_stay_as_they_came(make_run, tmp_path):
    source, run = make_run()
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a-00001.safetensors": names[:20], "a-00002.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, source / file, {"format": "pt", "shard": file})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "pytorch_model.bin").write_text("stale weights")
    before = files(source)
    export(run, tmp_path / "out")
    assert files(tmp_path / "out").keys() == before.keys() - {"pytorch_model.bin"} and files(source) == before
    for file, part in parts.items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert set(opened.keys()) == set(part) and opened.metadata()["shard"] == file
    assert all(torch.equal(value, scales(load(tmp_path / "out"))[name]) for name, value in best(run).items())


def best(run):
    return load_file(run / "best.safetensors")


@pytest.mark.parametrize(("method", "lr"), [("mezo", "1e-3"), ("ft", "1e-3")])
@pytest.mark.parametrize("state", ["best", "last"])
def test_full_weights_go_back_into_their_checkpoint_too(make_run, tmp_path, method, lr, state):
    source, run = make_run(method, lr=lr)
    before = files(source)
    export(run, tmp_path / "out", state)
    model, old = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", source))
    wanted = best(run) if state == "best" else None
    for (name, new), was in zip(model.named_parameters(), old.parameters(), strict=True):
        assert new.dtype == torch.bfloat16 and not torch.equal(new, was)
        assert wanted is None or torch.equal(new, wanted[name].bfloat16())
    assert files(source) == before


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_written_for_peft(make_run, input_ids, tmp_path, method):
    from peft import PeftModel

    source, run = make_run(method, lr="1e-2")
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source)
    assert len(load_file(tmp_path / "out/adapter_model.safetensors")) == len(best(run)) == 8
    if method == "lora":
        model = PeftModel.from_pretrained(load(source), tmp_path / "out")
        own = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
        for name, value in best(run).items():
            assert torch.equal(own[f"base_model.model.{name}"], value)


def test_a_gguf_file_becomes_a_folder(make_model, tmp_path, monkeypatch, input_ids, capsys):
    model = make_model(dtype=torch.bfloat16)
    tokenizer = load_tokenizer(standin.write_model(model, tmp_path / "plain", False))
    monkeypatch.setattr(sys.modules["qzo.training.tuned.export"], "load", lambda source: model)
    monkeypatch.setattr(sys.modules["qzo.training.tuned.export"], "load_tokenizer", lambda source: tokenizer)
    assert main(["export", "x.gguf", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "x.gguf in full numbers (bfloat16), as a folder of safetensors; nothing in it was tuned" in told
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(input_ids).logits, model(input_ids).logits)
    assert load_tokenizer(tmp_path / "out").encode("w5 w6") == [5, 6]


def test_a_model_is_copied_as_it_is(make_model, tmp_path):
    source = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True)
    assert main(["export", str(source), str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == files(source)


@pytest.mark.parametrize("case", ["nothing", "full", "shape", "name", "other", "gguf", "damaged", "state"])
def test_errors_are_one_line_and_exit_code_2(make_run, tmp_path, capsys, monkeypatch, case):
    source, run = make_run()
    out, options = tmp_path / "out", []
    tensors = best(run)
    name = next(iter(tensors))
    if case == "nothing":
        run, message = tmp_path, "is neither a run, nor a checkpoint of QZOTrainer, nor a model (no config.json)"
    elif case == "full":
        out, message = source, "exists and is not an empty folder"
    elif case == "shape":
        save_file({name: torch.zeros(3)}, run / "best.safetensors")
        message = f"has {name} with shape {tuple(tensors[name].shape)}, the tuned one has shape (3,)"
    elif case == "name":
        save_file({"other.scales": torch.zeros(3)}, run / "best.safetensors")
        message = "has other.scales not at all"
    elif case == "other":
        raw = load_file(source / "model.safetensors")
        raw["model.layers.0.mlp.up_proj.qweight"] += 1
        save_file(raw, source / "model.safetensors", {"format": "pt"})
        options, message = ["--state", "last"], "tuned tensors fit the model they were tuned on alone"
    elif case == "gguf":
        about = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**about, "model": "model.gguf", "base": None}))
        (run / "run.journal").unlink()
        (tmp_path / "model.gguf").write_text("")
        monkeypatch.chdir(tmp_path)
        save_file({"model.norm.weight": torch.ones(64)}, run / "best.safetensors")
        message = "model.gguf is not in safetensors format; qzo export it first"
    elif case == "damaged":
        (run / "best.safetensors").write_bytes(b"half")
        message = "best.safetensors cannot be read"
    else:
        options, message = ["--state", "first"], "invalid choice: 'first'"
    capsys.readouterr()
    before = files(source)
    assert main(["export", str(run), str(out), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1 and not any("Traceback" in line for line in lines)
    assert message in lines[-1]
    assert files(source) == before and not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_nothing(make_run, tmp_path, monkeypatch):
    source, run = make_run()
    before = files(source)

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(QzoError, match="out could not be written: No space left on device; nothing of it is left"):
        export(run, tmp_path / "out")
    assert files(source) == before and not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
