"""Which model a run was begun on: the same numbers have the same hash wherever they lie, other numbers another."""

import json
import os
import shutil

import pytest
import standin
import torch
from safetensors.torch import load_file, save_file

from qzo import QzoError, load
from qzo.checkpoints.identity import base_identity, check_base, content_hash


@pytest.fixture
def folder(make_model, tmp_path):
    return standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True)


def test_a_model_knows_where_it_is_from_whatever_folder_the_process_goes_to(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = load("model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert base_identity(model) == base_identity(folder) == {"model": str(folder), "base": content_hash(folder)}
    assert len(content_hash(folder)) == 64


def test_shards_and_other_words_of_the_configuration_do_not_count(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "moved")
    tensors = load_file(other / "model.safetensors")
    os.remove(other / "model.safetensors")
    names = sorted(tensors, reverse=True)
    parts = {"model-2.safetensors": names[:7], "model-1.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, other / file, {"format": "pt", "note": "in two"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "note": 1}))
    assert content_hash(other) == content_hash(folder)


@pytest.mark.parametrize("what", ["qweight", "qzeros", "g_idx", "scales", "norm.weight", "embed_tokens.weight"])
def test_one_bit_of_any_tensor_makes_another_model(folder, what):
    before = base_identity(folder)
    raw = load_file(folder / "model.safetensors")
    name = next(name for name in raw if name.endswith(what))
    raw[name].view(torch.uint8).view(-1)[3] ^= 1
    save_file(raw, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QzoError, match="what lies there now is another model"):
        check_base("run", before)
    with pytest.raises(QzoError, match=f"begun on {folder} with the content {before['base'][:12]}"):
        check_base("run", before, str(folder))


def test_other_settings_of_the_quantizer_make_another_model(folder):
    before = base_identity(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    assert base_identity(folder)["base"] != before["base"]


def test_a_model_that_moved_is_found_where_the_user_says(folder, tmp_path):
    before = base_identity(folder)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(QzoError, match=r"model, which is not there any more; name the place it moved to: --model PATH"):
        check_base("run", before)
    assert check_base("run", before, str(moved)) == str(moved)
    with pytest.raises(QzoError, match="run does not say which model it was begun on"):
        check_base("run", {})
    assert check_base("run", {"model": str(moved)}) == str(moved)  # of an older version: nothing to compare


def test_models_made_in_memory_have_no_files_and_damaged_ones_are_told(make_model, folder):
    assert base_identity(make_model()) == {"model": ""}
    data = (folder / "model.safetensors").read_bytes()
    for damaged in (data[:4], data[:-9], b"\xff" * 64, data[:8] + b"[" + data[9:]):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(QzoError, match="cannot be read"):
            content_hash(folder)
