"""What `qzo.save` writes of models that were loaded: as they came, but for what changed."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from bnb_files import write_bnb
from gptq_files import write_gptq
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, RwkvConfig

import qzo
from qzo.commands.main import main

Q_PROJ = "model.layers.0.self_attn.q_proj"
SETTINGS = {
    "dynamic": {"-:.*nothing.*": {}},
    "modules_in_block_to_quantize": [["self_attn.q_proj"]],
    "damp_percent": 0.01,
    "meta": {"quantizer": ["autoround:0.5"]},
}


@pytest.fixture
def folder(make_model, tmp_path):
    """A GPTQ checkpoint in two shards, with settings of its quantizer, a generation config and a note."""
    out = write_gptq(make_model(), tmp_path / "came", 4, act_order=True)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= SETTINGS
    (out / "config.json").write_text(json.dumps(config))
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True})
    )
    (out / "note.txt").write_text("as it came")
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    shards = {
        "model-00001-of-00002.safetensors": sorted(tensors)[::2],
        "model-00002-of-00002.safetensors": sorted(tensors)[1::2],
    }
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, out / file, {"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return out


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_everything_but_what_changed_is_as_it_came_to_the_bit(folder, tmp_path):
    model = qzo.load(folder, torch.bfloat16)  # rounds the fp16 norms and embeddings, which nobody trained
    qzo.scales(model)[f"{Q_PROJ}.scales"].mul_(1.25)
    model.model.norm.weight.data.mul_(2)
    qzo.save(model, tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()
    old, new = stored(folder), stored(tmp_path / "saved")
    assert old.keys() == new.keys()
    changed = {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    assert changed == {f"{Q_PROJ}.scales", "model.norm.weight"}
    assert torch.equal(new["model.norm.weight"], 2 * old["model.norm.weight"])


@pytest.mark.parametrize("into", ["new", "used"])
def test_save_pretrained_of_transformers_writes_the_same(folder, tmp_path, into, input_ids):
    model = qzo.load(folder)
    if into == "used":
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved/mine.txt").touch()
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"].items() >= SETTINGS.items()
    assert torch.equal(qzo.load(tmp_path / "saved")(input_ids).logits, model(input_ids).logits)
    assert (tmp_path / "saved/mine.txt").exists() == (into == "used") and not list(tmp_path.rglob("*.part"))
    with pytest.raises(qzo.QzoError, match="push_to_hub is not supported; save to a folder"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)


def test_a_replayed_model_keeps_the_settings_it_came_with(folder, tmp_path, input_ids):
    model = qzo.load(folder)
    optimizer = qzo.QZO(qzo.scales(model), lr=1e-3)
    with qzo.Journal(tmp_path / "run.journal", model, optimizer) as journal:
        optimizer.step(lambda: qzo.label_loss(model, input_ids, input_ids))
        journal.record()
    assert main(["replay", str(folder), str(tmp_path / "run.journal"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "out/generation_config.json").is_file()
    assert torch.equal(qzo.load(tmp_path / "out")(input_ids).logits, model(input_ids).logits)


def test_the_generation_config_is_read_and_one_that_changed_is_written(folder, tmp_path):
    model = qzo.load(folder)
    assert model.generation_config.eos_token_id == [2, 7] and model.generation_config.temperature == 0.6
    model.generation_config.eos_token_id = [2, 7, 9]
    qzo.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["eos_token_id"] == [2, 7, 9]
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(qzo.QzoError, match=r"generation_config.json: .*; mend it, or remove it"):
        qzo.load(folder)


@pytest.mark.parametrize("how", ["moved", "quantized anew"])
def test_where_the_files_are_others_by_now_memory_is_written_with_the_settings_that_were_read(
    make_model, folder, tmp_path, how, input_ids
):
    model = qzo.load(folder)
    shutil.rmtree(folder)
    if how == "quantized anew":
        write_gptq(make_model(), folder, 4)
    qzo.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"].items() >= SETTINGS.items()
    assert torch.equal(qzo.load(tmp_path / "saved")(input_ids).logits, model(input_ids).logits)


def test_a_format_without_a_layout_of_its_own_needs_its_files(make_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model().save_pretrained(tmp_path / "plain")
    model = qzo.load(write_bnb(tmp_path / "plain", tmp_path / "came", "nf4"))
    qzo.save(model, tmp_path / "saved")
    (tmp_path / "came").rename(tmp_path / "away")
    with pytest.raises(qzo.QzoError, match="is not there any more; put it back as it was"):
        qzo.save(model, tmp_path / "again")
    (tmp_path / "away").rename(tmp_path / "came")
    next(iter(model.modules())).get_submodule(Q_PROJ).qweight.add_(1)
    with pytest.raises(qzo.QzoError, match="holds other codes than it did; put it back as it was"):
        qzo.save(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_scales_that_are_not_finite_are_not_written(folder, tmp_path):
    model = qzo.load(folder)
    qzo.scales(model)[f"{Q_PROJ}.scales"][0, 0] = float("nan")
    with pytest.raises(qzo.QzoError, match=f"{Q_PROJ}.scales has values that are not finite"):
        qzo.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_copies_and_pickles_of_a_model_still_know_where_it_came_from(folder, tmp_path):
    model = qzo.load(folder)
    for name, twin in (("copied", copy.deepcopy(model)), ("pickled", pickle.loads(pickle.dumps(model)))):
        twin.model.norm.weight.data.zero_()
        twin.save_pretrained(tmp_path / name)
        assert not stored(tmp_path / name)["model.norm.weight"].any()
        assert (tmp_path / name / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert model.model.norm.weight.any()


def test_what_cannot_be_saved_says_what_can(make_model, folder, tmp_path):
    from qzo.live.adapters import add_adapters

    with pytest.raises(qzo.QzoError, match=r"adapters is not written whole; model.save_pretrained\(folder\) writes"):
        qzo.save(add_adapters(qzo.load(folder)), tmp_path / "saved")
    with pytest.raises(qzo.QzoError, match="no transformers model; save its state_dict"):
        qzo.save(torch.nn.Linear(2, 2), tmp_path / "saved")
    with pytest.raises(qzo.QzoError, match='revision="main" is of a hub id'):
        qzo.load(folder, revision="main")


def test_an_unquantized_model_is_written_whole_with_the_tokenizer_that_is_given(make_model, tmp_path, input_ids):
    class Words:
        def save_pretrained(self, folder):
            (folder / "words.txt").touch()

    model = make_model()
    qzo.save(model, tmp_path / "saved", Words())
    assert (tmp_path / "saved/words.txt").exists() and (tmp_path / "saved/generation_config.json").exists()
    assert torch.equal(qzo.load(tmp_path / "saved", torch.float32)(input_ids).logits, model(input_ids).logits)


def test_a_hub_revision_is_asked_for_everywhere(folder, monkeypatch):
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = qzo.load("some/model", revision="v2")
    assert asked == [("some/model", "v2")] and model.generation_config.eos_token_id == [2, 7]


def test_a_model_that_halves_its_own_weights_is_saved_as_it_was_read(tmp_path, input_ids):
    config = RwkvConfig(vocab_size=96, hidden_size=64, attention_hidden_size=64, num_hidden_layers=3, rescale_every=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    model = qzo.quantize(qzo.load(tmp_path / "plain", torch.float32), 4, 32)
    logits = model(input_ids).logits
    qzo.save(model, tmp_path / "saved")
    assert torch.equal(qzo.load(tmp_path / "saved", torch.float32)(input_ids).logits, logits)
    assert len(qzo.scales(model)) == 3 * 5  # without the two that RWKV reads by itself
