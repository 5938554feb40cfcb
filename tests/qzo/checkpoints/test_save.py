"""Writing GPTQ checkpoints and reading them back, whole or damaged."""

import json
import shutil

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from qzo import QZO, load, quantize, scales
from qzo.checkpoints.save import save
from qzo.errors import QzoError
from qzo.files.folder import download
from qzo.formats.gptq.codes import unpack_zeros


@pytest.fixture
def saved(make_model, tmp_path):
    model = quantize(make_model(dtype=torch.bfloat16), 4, 32)
    save(model, tmp_path / "model")
    return model, tmp_path / "model"


def rewrite(folder, change):
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, **quantization):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_a_model_comes_back_bit_for_bit(make_model, input_ids, tmp_path, family, checkpoint_format, n_bits):
    model = quantize(make_model(family, torch.float32, tied=True), n_bits, 16)
    save(model, tmp_path / "model", checkpoint_format=checkpoint_format)
    again = load(tmp_path / "model")
    assert torch.equal(again(input_ids).logits, model(input_ids).logits)
    assert scales(again).keys() == scales(model).keys() and not again.training
    eps = 1e-3 if n_bits < 8 else 1e-5  # 8-bit scales are 17 times smaller
    QZO(scales(again), eps=eps).step(lambda: again(input_ids, labels=input_ids).loss)


def test_the_file_has_the_gptq_layout(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    assert json.loads((folder / "quantize_config.json").read_text()) == config["quantization_config"]
    assert config["dtype"] == "bfloat16" and config["model_type"] == "llama"
    tensors = load_file(folder / "model.safetensors")
    shapes = {name[len(Q_PROJ) + 1 :]: (t.shape, t.dtype) for name, t in tensors.items() if name.startswith(Q_PROJ)}
    assert shapes == {
        "qweight": ((8, 64), torch.int32),
        "qzeros": ((2, 8), torch.int32),
        "scales": ((2, 64), torch.float16),
        "g_idx": ((64,), torch.int32),
    }
    assert (unpack_zeros(tensors[f"{Q_PROJ}.qzeros"], 4) == 7).all()
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_asymmetric_models_need_v2_where_a_zero_point_is_zero(make_model, tmp_path, input_ids):
    model = make_model()
    model.model.layers[0].self_attn.q_proj.weight.data.abs_()
    quantize(model, 4, 32, symmetric=False)
    with pytest.raises(QzoError, match="gptq_v2"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    save(model, tmp_path / "model", checkpoint_format="gptq_v2")
    assert torch.equal(load(tmp_path / "model")(input_ids).logits, model(input_ids).logits)


def test_act_order_and_a_bias_the_architecture_lacks_are_read(saved, input_ids):
    _, folder = saved
    order = torch.randperm(64)

    def change(tensors):
        tensors[f"{Q_PROJ}.g_idx"] = tensors[f"{Q_PROJ}.g_idx"][order].contiguous()
        tensors[f"{Q_PROJ}.bias"] = torch.ones(64, dtype=torch.bfloat16)

    rewrite(folder, change)
    layer = load(folder).model.layers[0].self_attn.q_proj
    assert layer.act_order and torch.equal(layer.bias, torch.ones(64).bfloat16())
    assert torch.isfinite(load(folder)(input_ids).logits).all()


def test_shards_are_read_through_their_index(saved, input_ids):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, names in parts.items() for name in names}}))
    assert torch.equal(load(folder)(input_ids).logits, model(input_ids).logits)
    index.write_text(json.dumps({"weight_map": {"x": "../model/a.safetensors"}}))
    with pytest.raises(QzoError, match="not a file in that folder"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(QzoError, match="has no weight_map"):
        load(folder)


def drop(name):
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def replace(name, tensor):
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "is damaged": truncate,
    "tensors are missing": drop(f"{Q_PROJ}.scales"),
    "has no tensor strange": replace("strange", torch.zeros(2)),
    "qzeros is I32": replace(f"{Q_PROJ}.qzeros", torch.zeros(2, 16, dtype=torch.int32)),
    "scales is I32": replace(f"{Q_PROJ}.scales", torch.zeros(2, 64, dtype=torch.int32)),
    "g_idx has values outside": replace(f"{Q_PROJ}.g_idx", torch.full((64,), 2, dtype=torch.int32)),
    "but config.json implies": lambda folder: reconfigure(folder, bits=8),
    "n_bits=5": lambda folder: reconfigure(folder, bits=5),
    "bits and group_size": lambda folder: reconfigure(folder, bits=None),
    r"qzeros is I32 \(5, 8\), but config.json implies I32 \(4, 8\) \(by bits, group_size": lambda folder: reconfigure(
        folder, group_size=48
    ),
    'checkpoint_format="marlin"': lambda folder: reconfigure(folder, checkpoint_format="marlin"),
    'quant_method="quanto"': lambda folder: reconfigure(folder, quant_method="quanto"),
    "no tensor holds codes, and config.json says hqq": lambda folder: reconfigure(folder, quant_method="hqq"),
    "config.json cannot be read": lambda folder: (folder / "config.json").write_text("{"),
    "only safetensors": lambda folder: (folder / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_or_contradictory_folders_give_one_clear_line(saved, message):
    _, folder = saved
    DAMAGE[message](folder)
    with pytest.raises(QzoError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_unquantized_folders_come_unquantized_in_bf16(make_model, tmp_path, input_ids):
    make_model().save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    assert model.dtype == torch.bfloat16 and load(tmp_path / "plain", torch.float32).dtype == torch.float32
    assert torch.isfinite(quantize(model, 4, 32)(input_ids).logits).all()
    shutil.rmtree(tmp_path / "plain")
    with pytest.raises(QzoError, match="is not a folder"):
        load(tmp_path / "plain")


def test_gguf_files_come_dequantized_and_as_plain_models(make_model, tmp_path, input_ids):
    source = make_model(tied=True)
    write_gguf(source, tmp_path / "tiny.gguf")
    model = load(tmp_path / "tiny.gguf", torch.float32)
    torch.testing.assert_close(model(input_ids).logits, source(input_ids).logits, rtol=1e-4, atol=1e-4)
    save(quantize(model.bfloat16(), 4, 32), tmp_path / "out")
    assert len(scales(load(tmp_path / "out"))) == 14


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_paths_that_do_not_exist_are_not_looked_for_on_the_hub(name):
    with pytest.raises(QzoError, match="is not a folder"):
        download(name)
    with pytest.raises(QzoError, match="is not a file"):
        load(f"{name}.gguf")


def test_saving_refuses_what_it_cannot_hold(make_model, tmp_path):
    with pytest.raises(QzoError, match="no QuantLinear"):
        save(make_model(), tmp_path / "model", checkpoint_format="gptq")
    with pytest.raises(QzoError, match="transformers model"):
        save(quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), 4, 32), tmp_path / "model")
    with pytest.raises(QzoError, match="embeddings"):
        save(quantize(make_model(), 4, 32, embeddings=8), tmp_path / "model")
    with pytest.raises(QzoError, match="checkpoint_format"):
        save(quantize(make_model(), 4, 32), tmp_path / "model", checkpoint_format="marlin")
    mixed = quantize(make_model(), 4, 32)
    mixed.model.layers[0].mlp = quantize(make_model(), 8, 32).model.layers[0].mlp
    with pytest.raises(QzoError, match="holds one of each"):
        save(mixed, tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(QzoError, match="not an empty folder"):
        save(quantize(make_model(), 4, 32), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_whole_row_groups_are_saved_as_minus_one(make_model, tmp_path, input_ids):
    model = quantize(make_model(), 4, -1)
    save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]["group_size"] == -1
    assert torch.equal(load(tmp_path / "model")(input_ids).logits, model(input_ids).logits)


def test_an_interrupted_save_leaves_nothing_behind(make_model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(QzoError, match="could not be written: disk full; nothing of it is left"):
        save(quantize(make_model(), 4, 32), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_unquantized_folder_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import qzo

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(qzo.QzoError, match=r"1 tensors are missing, the first is model.layers.1.mlp.down_proj.weight"):
        qzo.load(tmp_path)
