"""HQQ and torchao checkpoints through the commands and QZOTrainer, with adapters, and without their libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest
import standin
import torch
from cases_hqq import write as write_hqq
from cases_torchao import CASES as TORCHAO
from safetensors.torch import load_file
from tiny_models import write_plain
from transformers import TrainingArguments

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.write import write_checkpoint
from qzo.commands.main import main
from qzo.formats.hqq import library as hqq
from qzo.formats.torchao import library as torchao

pytest.importorskip("hqq", reason="needs hqq")
pytest.importorskip("torchao", reason="needs torchao")
KINDS = ("pt", "hqq", "int8", "int4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> folder of a checkpoint."""
    folder = tmp_path_factory.mktemp("stored")
    plain = write_plain("llama", folder / "plain")
    write_hqq(plain, folder / "pt", nbits=4, group_size=32)
    write_hqq(plain, folder / "hqq", safetensors=True, nbits=4, group_size=32, axis=0)
    for case in TORCHAO:
        if case.family == "llama" and case.name in ("torchao-int8", "torchao-int4"):
            case.write(plain, folder / case.name.removeprefix("torchao-"))
    for kind in KINDS:
        standin.write_tokenizer(folder / kind)
    return {kind: folder / kind for kind in KINDS}


def stored(folder):
    """Name -> tensor of all that a checkpoint holds."""
    if not (folder / "qmodel.pt").is_file():
        return load_file(folder / "model.safetensors")
    state = torch.load(folder / "qmodel.pt", weights_only=True)
    flat = {f"{path}.{name}": value for path, about in state.items() for name, value in about.items()}
    return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", KINDS)
def test_commands_and_trainer_keep_the_format(folders, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "qzo.tasks", standin.module())
    folder, run = folders[kind], tmp_path / "run"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = ["train", str(folder), *standin.PAPER, "--steps", "4", "--lr", "1e-3", "--relative"]
    assert main([*command, "--out", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--state", "last"]) == 0
    assert main(["replay", str(folder), str(run / "run.journal"), str(tmp_path / "replayed")]) == 0
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys()
    weights = "qmodel.pt" if kind == "pt" else "model.safetensors"
    assert {name for name in after if after[name] != before[name]} == {weights}
    old, new, replayed = stored(folder), stored(tmp_path / "out"), stored(tmp_path / "replayed")
    moved = (".scale", "_weight_scale", *(["_weight_zero_point"] if kind == "int4" else []))  # offsets follow
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.endswith(moved)}
    assert all(torch.equal(replayed[name], new[name]) for name in new)
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    row = torch.arange(5, 13)
    arguments = TrainingArguments(str(tmp_path / "trainer"), **options)
    trainer = qzo.QZOTrainer(qzo.load(folder), arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert stored(tmp_path / "saved").keys() == old.keys() and inspect(tmp_path / "saved").reason is None
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_unquantized_parts_are_trained_and_written_too(folders, tmp_path, input_ids):
    for kind in KINDS:
        model = qzo.load(folders[kind], torch.float32)
        groups = qzo.trainable(model, "scales+unquantized", follow=False)
        qzo.QZO(groups, lr=1e-3).step(lambda: model(input_ids, labels=input_ids).loss)  # noqa: B023
        tensors = {**groups[0]["params"], **groups[1]["params"]}
        write_checkpoint(folders[kind], tensors, tmp_path / kind)
        again = qzo.load(tmp_path / kind, torch.float32)
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_a_place_are_refused_and_nothing_is_left(folders, tmp_path, kind):
    name = "model.layers.0.self_attn.q_proj.scales"
    for tensors in ({name: torch.ones(3)}, {"strange.scales": torch.ones(3)}):
        with pytest.raises(qzo.QzoError) as caught:
            write_checkpoint(folders[kind], tensors, tmp_path / "out")
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_training_needs_neither_library_and_what_does_names_the_command(folders, tmp_path, monkeypatch, input_ids):
    monkeypatch.setitem(sys.modules, "hqq", None)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for kind in KINDS:
        model = qzo.load(folders[kind], torch.float32)
        qzo.QZO(qzo.scales(model), lr=1e-4).step(lambda: model(input_ids, labels=input_ids).loss)  # noqa: B023
        write_checkpoint(folders[kind], qzo.scales(model), tmp_path / kind)
        extra = "hqq" if kind in ("pt", "hqq") else "torchao"
        with pytest.raises(qzo.QzoError, match=rf"pip install 'qzo\[{extra}\]'"):
            qzo.release(model)
    for library, extra in ((hqq, "hqq"), (torchao, "torchao")):
        with pytest.raises(qzo.QzoError, match=rf"pip install 'qzo\[{extra}\]'"):
            library.quantize(torch.randn(64, 64))


def test_importing_qzo_imports_neither_library():
    modules = "qzo.checkpoints.load, qzo.live.adopt, qzo.checkpoints.inspect"
    code = f"import sys, qzo, {modules}; assert not {{'hqq', 'torchao'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
