"""Tuned scales in a copy of their GGUF file: no other byte changes, and every reader sees the tuned model."""

import errno
import json
import os
import sys

import numpy as np
import pytest
import standin
import torch
from gguf_files import SIMPLE, stored_tensors, tiny, write_gguf
from optional import gguf
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import qzo
from qzo import QZO, QzoError, QZOTrainer, export, load, scales, trainable
from qzo.commands.main import main
from qzo.formats.gguf.tuned import write_gguf as write_tuned
from qzo.live.trainable import live_named
from qzo.optim.spsa import live_tensors


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def changed(one, other):
    """Byte offsets at which two files of one size differ."""
    first, second = (np.frombuffer(file.read_bytes(), np.uint8) for file in (one, other))
    assert len(first) == len(second)
    return np.flatnonzero(first != second)


def numbers_of(file):
    """Byte offsets of every scale and offset in a file, from the package gguf's own reading of it."""
    found = []
    for tensor in stored_tensors(file).values():
        if tensor.tensor_type.name in SIMPLE:
            _, n_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            starts = tensor.data_offset + np.arange(0, tensor.n_bytes, n_bytes)
            width = 4 if tensor.tensor_type.name.endswith("_1") else 2
            found.append((starts[:, None] + np.arange(width)).ravel())
    return np.concatenate(found)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """`make_run(kind, method)`: a run of eight steps on a .gguf file by `qzo train`; returns file and run."""
    task = standin.module()
    monkeypatch.setitem(sys.modules, "qzo.tasks", task)
    accuracies = iter([0.0, 0.1, 0.2, 0.9, 0.3, 0.3, 0.3])
    task.evaluate = lambda *_, **__: {"accuracy": next(accuracies), "loss": 1.0, "count": 1}

    def make(kind="Q4_1", method="qzo"):
        file = write_gguf(tiny(), tmp_path / "model.gguf", kind)
        options = ["--method", method, "--lr", "1e-4", "--steps", "8", "--eval-every", "2", "--batch-size", "2"]
        assert (
            main(["train", str(file), "--preset", "paper", "--task", "any", "--out", str(tmp_path / "run"), *options])
            == 0
        )
        return file, tmp_path / "run"

    return make


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("follow", [False, True])
def test_a_tuned_model_comes_back_from_its_file_and_only_scales_differ(tmp_path, input_ids, kind, follow):
    file, target = write_gguf(tiny(), tmp_path / "model.gguf", kind), tmp_path / "tuned.gguf"
    original = file.read_bytes()
    model = load(file, torch.float32, dequantize=False)
    before = logits(model, input_ids)
    optimizer = QZO(trainable(model, follow=follow), lr=1e-4)
    for _ in range(3):
        optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
    write_tuned(file, live_tensors(optimizer), target)
    assert file.read_bytes() == original
    where = changed(file, target)
    assert len(where) and np.isin(where, numbers_of(file)).all()
    again, dense = load(target, torch.float32, dequantize=False), load(target, torch.float32)
    assert torch.equal(logits(again, input_ids), logits(model, input_ids))
    torch.testing.assert_close(logits(dense, input_ids), logits(model, input_ids), rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, logits(model, input_ids))
    stored = stored_tensors(target)["blk.1.ffn_down.weight"]
    weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(weight, model.model.layers[1].mlp.down_proj.dequantize())


@pytest.mark.parametrize("state", ["best", "last"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_run_on_a_gguf_file_is_exported_as_one(make_run, tmp_path, input_ids, kind, state):
    file, run = make_run(kind)
    original = file.read_bytes()
    assert main(["export", str(run), str(tmp_path / "out"), "--state", state]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"] and file.read_bytes() == original
    where = changed(file, tmp_path / "out/model.gguf")
    assert len(where) and np.isin(where, numbers_of(file)).all()
    tuned = load(file, dequantize=False)
    if state == "best":
        own = live_named(tuned)
        for name, value in load_file(run / "best.safetensors").items():
            own[name].copy_(value)
    else:
        qzo.replay(tuned, run / "run.journal")
    exported = load(tmp_path / "out/model.gguf", dequantize=False)
    assert torch.equal(logits(exported, input_ids), logits(tuned, input_ids))


def test_a_run_trains_layers_and_their_offsets_but_not_the_vocabulary(make_run):
    _, run = make_run("Q4_1")
    names = set(load_file(run / "best.safetensors"))
    assert len(names) == 28 and not any("embed_tokens" in name for name in names)
    assert {name.replace("offsets", "scales") for name in names if name.endswith("offsets")} < names


def test_replay_writes_a_gguf_file_too(make_run, tmp_path, capsys):
    file, run = make_run()
    assert main(["replay", str(file), str(run / "run.journal"), str(tmp_path / "replayed")]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--state", "last"]) == 0
    assert not len(changed(tmp_path / "replayed/model.gguf", tmp_path / "out/model.gguf"))
    assert "steps                      8" in capsys.readouterr().out


def test_qlora_trains_adapters_on_packed_layers(make_run, tmp_path):
    file, run = make_run("Q4_0", "qlora")
    export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    assert len(load_file(run / "best.safetensors")) == 8


@pytest.mark.parametrize("method", ["mezo", "ft"])
def test_full_weights_are_trained_dequantized_and_have_no_place_in_the_file(make_run, tmp_path, capsys, method):
    _, run = make_run("Q8_0", method)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "model.gguf is not in safetensors format; qzo export it first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_trainer_saves_its_model_and_its_checkpoints_export(tmp_path, input_ids):
    file = write_gguf(tiny(), tmp_path / "model.gguf", "Q5_1")
    rows = [{"input_ids": row, "labels": row} for row in input_ids]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, learning_rate=1e-4, report_to=[], use_cpu=True
    )
    trainer = QZOTrainer(load(file, torch.float32, dequantize=False), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    export(tmp_path / "run/checkpoint-2", tmp_path / "out")
    assert len(changed(file, tmp_path / "saved/model.gguf"))
    assert not len(changed(tmp_path / "saved/model.gguf", tmp_path / "out/model.gguf"))


@pytest.mark.parametrize("case", ["shape", "name", "offset", "plain"])
def test_tensors_without_a_place_are_refused_before_anything_is_written(make_run, tmp_path, capsys, case):
    file, run = make_run("Q4_0")
    name, scale = next(iter(scales(load(file, dequantize=False)).items()))
    wrong, message = {
        "shape": ({name: scale[1:].clone()}, f"has {name} with shape (64, 2), the tuned one has shape (63, 2)"),
        "name": (
            {"model.layers.7.mlp.up_proj.scales": scale.clone()},
            "no place for model.layers.7.mlp.up_proj.scales",
        ),
        "offset": (
            {name.replace("scales", "offsets"): scale.clone()},
            f"no place for {name.replace('scales', 'offsets')}",
        ),
        "plain": ({"model.norm.scales": scale.clone()}, "no place for model.norm.scales"),
    }[case]
    save_file(wrong, run / "best.safetensors")
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_nothing(make_run, tmp_path, monkeypatch):
    file, run = make_run()
    original = file.read_bytes()

    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(QzoError, match="out could not be written: No space left on device; nothing of it is left"):
        export(run, tmp_path / "out")
    assert file.read_bytes() == original and not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
