"""Checkpoints with other names than their models: single experts, leftovers."""

import json
import re

import pytest
import torch
from mixtures import FAMILIES, MIXTURES, TEXT, published, small_ones_left, tiny
from published import coded, publish
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY
from transformers import (
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    core_model_loading,
)

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.write import write_checkpoint


@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_are_read_one_by_one_under_their_published_names(tmp_path, input_ids, kind):
    make, own = FAMILIES[kind]
    renamed = published if kind == "mixtral" else lambda name: name
    layers, folder = {}, tmp_path / "came"

    def seeded(path):
        settings = small_ones_left(path)
        return None if settings is None else {"seed": layers.setdefault(path, len(layers))}  # gate and up too

    reference = publish(tiny(make(**TEXT | own)), folder, seeded, renamed, settings={"desc_act": True})
    assert inspect(folder).reason is None
    model = qzo.load(folder, torch.float32)
    torch.testing.assert_close(model(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
    place = "model.layers.1.block_sparse_moe.experts" if kind == "granite" else "model.layers.1.mlp.experts"
    experts, stacks = (one.get_submodule(place) for one in (model, reference))
    gate, up = stacks.gate_up_proj[3].chunk(2)
    assert torch.equal(experts.gate_proj[3].dequantize(), gate) and torch.equal(experts.up_proj[3].dequantize(), up)
    assert torch.equal(experts.down_proj[3].dequantize(), stacks.down_proj[3])
    qzo.scales(model)[f"{place}.up_proj.2.scales"].mul_(1.25)
    qzo.save(model, tmp_path / "saved")
    old, new = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "saved"))
    changed = {key for key, value in old.items() if not torch.equal(value, new[key])}
    assert old.keys() == new.keys() and changed == {renamed(f"{place}.2.up_proj.scales")}
    logits = model(input_ids).logits
    optimizer = qzo.QZO(qzo.scales(model), lr=1e-3)
    for step in range(2):
        optimizer.step(lambda step=step: qzo.label_loss(model, input_ids[step:], input_ids[step:]))
    qzo.save(model, tmp_path / "trained")
    trained = model(input_ids).logits
    assert not torch.equal(trained, logits)
    assert torch.equal(qzo.load(tmp_path / "trained", torch.float32)(input_ids).logits, trained)


@pytest.mark.parametrize("apart", ["gate_proj and up_proj", "gate_up_projs"])
@pytest.mark.parametrize("kind", ["llama 4", "gpt-oss"])
def test_quantized_experts_that_compute_otherwise_are_told_as_what_they_are(tmp_path, kind, apart):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    make = Llama4TextConfig if kind == "llama 4" else GptOssConfig

    def renamed(name):
        if apart == "gate_up_projs":
            name = re.sub(r"experts\.(\d+)\.(gate|up)_proj", r"experts.gate_up_projs.\1", name)
            name = re.sub(r"experts\.(\d+)\.down_proj", r"experts.down_projs.\1", name)
        return name

    publish(tiny(make(**TEXT | sizes | tokens)), tmp_path / "came", small_ones_left, renamed)
    message = (
        r"experts of type (Llama4Text|GptOss)Experts are not supported; .*; take a checkpoint that leaves them unq"
    )
    with pytest.raises(qzo.QzoError, match=message):
        qzo.load(tmp_path / "came")
    assert re.search(message, str(inspect(tmp_path / "came").reason))


def test_experts_whose_gate_and_up_are_one_layer_in_the_files(tmp_path, input_ids):
    make, own = FAMILIES["granite"]
    reference = publish(tiny(make(**TEXT | own)), tmp_path / "came", lambda path: None)
    tensors = load_file(tmp_path / "came/model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name, stack in reference.state_dict().items():
        for expert, weight in enumerate(stack if ".experts." in name else ()):
            parts, dense = coded(weight)
            weight.copy_(dense)
            tensors |= {f"{name}s.{expert}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "came/model.safetensors", {"format": "pt"})
    found = qzo.load(tmp_path / "came", torch.float32)
    torch.testing.assert_close(found(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
    assert len(qzo.scales(found)) == 2 * 2 * 4


def test_names_that_only_quantizers_write_are_not_those_of_unquantized_files(tmp_path):
    """Of which transformers would draw such experts at random."""
    make, own = FAMILIES["granite"]
    publish(tiny(make(**TEXT | own)), tmp_path / "came", lambda path: None)
    config = json.loads((tmp_path / "came/config.json").read_text())
    (tmp_path / "came/config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(qzo.QzoError, match=r"the model has no tensor .*experts.0.* take both from one checkpoint"):
        qzo.load(tmp_path / "came")


def test_plain_experts_beside_codes_are_stacked(tmp_path, input_ids):
    make, own = MIXTURES["mixtral"]
    folder = tmp_path / "came"

    def attention(path):
        return {} if ".self_attn." in path else None

    reference = publish(tiny(make(**TEXT | own)), folder, attention, published)
    model = qzo.load(folder, torch.float32)
    torch.testing.assert_close(model(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
    assert len(qzo.scales(model)) == 8 and model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 128, 64)
    qzo.save(model, tmp_path / "saved")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"] = torch.ones(32, 64).half()
    save_file(tensors, folder / "model.safetensors")
    assert "do not fit together" in str(inspect(folder).reason)


@pytest.mark.parametrize("kind", MIXTURES)
def test_trained_plain_experts_are_written_one_by_one(tmp_path, input_ids, kind):
    make, own = MIXTURES[kind]
    folder = tmp_path / "came"
    renamed = published if kind == "mixtral" else lambda name: name
    publish(tiny(make(**TEXT | own)), folder, lambda path: {} if "o_proj" in path else None, renamed)
    model = qzo.load(folder, torch.float16)
    optimizer = qzo.QZO(qzo.trainable(model, "scales+unquantized"), lr=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(2):
        optimizer.step(lambda step=step: qzo.label_loss(model, input_ids[step:], input_ids[step:]))
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "model.layers.1.mlp.experts.gate_up_proj" in moved and "model.layers.1.mlp.experts.down_proj" in moved
    qzo.save(model, tmp_path / "saved")
    again = qzo.load(tmp_path / "saved", torch.float16).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    assert {name: value.shape for name, value in old.items()} == {name: value.shape for name, value in new.items()}


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_a_tuned_unquantized_model_is_written_under_the_names_of_its_files(tmp_path, kind):
    """Experts one by one, and layers without the name of the base model."""
    own = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    model = tiny(GPT2Config(**own) if kind == "gpt2" else MixtralConfig(**TEXT | MIXTURES[kind][1]))
    renamed = published if kind == "mixtral" else lambda name: name.removeprefix("transformer.")
    publish(model, tmp_path / "came", lambda path: None, renamed)
    config = json.loads((tmp_path / "came" / "config.json").read_text())
    (tmp_path / "came" / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    tuned = {name: value.detach().half() + 0.5 for name, value in model.named_parameters()}
    write_checkpoint(tmp_path / "came", tuned, tmp_path / "out")
    again = qzo.load(tmp_path / "out", torch.float16).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in tuned.items())


def test_a_joining_that_cannot_be_undone_is_refused(tmp_path, monkeypatch):
    make, own = MIXTURES["mixtral"]
    publish(tiny(make(**TEXT | own)), tmp_path / "came", lambda path: {} if "o_proj" in path else None, published)
    model = qzo.load(tmp_path / "came", torch.float16)
    model.model.layers[0].mlp.experts.gate_up_proj.data.zero_()
    monkeypatch.setattr(core_model_loading.Chunk, "convert", lambda self, made, **_: made)
    with pytest.raises(qzo.QzoError, match=r"gate_up_proj is 8 tensors .* cannot be undone; train the scales alone"):
        qzo.save(model, tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize(("kind", "double"), [("qwen3", True), *((kind, False) for kind in FAMILIES)])
def test_experts_of_bitsandbytes_one_by_one(tmp_path, input_ids, kind, double):
    """As transformers 4 wrote them, when experts were linear layers."""
    functional = pytest.importorskip("bitsandbytes").functional
    make, own = FAMILIES[kind]
    renamed = published if kind == "mixtral" else lambda name: name
    folder = tmp_path / "came"
    reference = publish(tiny(make(**TEXT | own)), folder, lambda path: None)
    tensors = load_file(folder / "model.safetensors")
    layers = [name for name in tensors if re.search(r"experts\.\d+\.\w+\.weight$|self_attn.\w_proj.weight$", name)]
    for name in layers:
        codes, state = functional.quantize_4bit(tensors.pop(name).float(), quant_type="nf4", compress_statistics=double)
        parts = {f"{name}.{part}": value.clone() for part, value in state.as_dict(packed=True).items()}
        tensors |= {name: codes, **parts}
        dense = functional.dequantize_4bit(codes, state)
        path, _, last = name.removesuffix(".weight").rpartition(".")
        if ".experts" in path:
            stack, _, number = path.rpartition(".")
            experts, half = reference.get_submodule(stack), slice(*((64, 128) if last == "up_proj" else (0, 64)))
            (experts.down_proj if last == "down_proj" else experts.gate_up_proj).data[int(number), half] = dense
        else:
            reference.get_submodule(f"{path}.{last}").weight.data = dense
    tensors = {renamed(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config["quantization_config"] = about | {"bnb_4bit_use_double_quant": double}
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).reason is None
    model = qzo.load(folder, torch.float32)
    assert len(qzo.scales(model)) == len(layers) and sum(".experts." in name for name in layers) in (12, 24)
    torch.testing.assert_close(model(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
    place = "model.layers.1.block_sparse_moe.experts" if kind == "granite" else "model.layers.1.mlp.experts"
    qzo.scales(model)[f"{place}.gate_proj.1.scales"].mul_(1.25)
    qzo.save(model, tmp_path / "saved")
    changed = load_file(tmp_path / "saved/model.safetensors")
    names = {name for name, value in tensors.items() if not torch.equal(value, changed[name])}
    assert names and all(name.startswith(renamed(f"{place}.1.gate_proj.weight.")) for name in names)


def test_fewer_layers_in_the_configuration_than_in_the_files_are_told(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    message = "is of layer 1, but config.json implies layers 0 ... 0 only; .* take config.json and weights from one"
    with pytest.raises(qzo.QzoError, match=message):
        qzo.load(tmp_path / "plain")
    assert re.search(message, str(inspect(tmp_path / "plain").reason))


def test_unquantized_files_with_more_than_the_model_are_told_unless_it_is_known_to_be_of_no_use(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain/model.safetensors")
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.2.eh_proj.weight": torch.ones(2),  # a layer for the tokens after the next
        "model.layers.2.mlp.up_proj.weight": torch.ones(2),
    }
    save_file(tensors | harmless, tmp_path / "plain/model.safetensors", {"format": "pt"})
    assert "it is not quantized; first run" in str(inspect(tmp_path / "plain").reason)
    qzo.load(tmp_path / "plain")
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.extra.weight"):
        save_file(tensors | {name: torch.ones(64)}, tmp_path / "plain/model.safetensors", {"format": "pt"})
        assert f"the model has no tensor {name}" in str(inspect(tmp_path / "plain").reason)
        with pytest.raises(qzo.QzoError, match=f"the model has no tensor {name}; .* take both from one checkpoint"):
            qzo.load(tmp_path / "plain")


def test_layers_that_the_class_ignores_may_be_left(tmp_path, input_ids):
    make, own = MIXTURES["deepseek"]
    more = {
        "model.layers.61.eh_proj.weight": torch.ones(4, 4).half(),
        "model.layers.61.mlp.down_proj.qweight": torch.ones(1),
    }
    publish(tiny(make(**TEXT | own)), tmp_path / "came", small_ones_left, settings={"desc_act": True}, more=more)
    assert (
        inspect(tmp_path / "came").reason is None
        and torch.isfinite(qzo.load(tmp_path / "came")(input_ids).logits).all()
    )


def test_two_tied_weights_that_differ_in_the_files_both_stay(make_model, tmp_path, input_ids):
    reference = make_model(tied=True)
    head = torch.randn(VOCABULARY, 64).half()
    publish(reference, tmp_path / "came", lambda path: None if path == "lm_head" else {}, more={"lm_head.weight": head})
    model = qzo.load(tmp_path / "came", torch.float32)
    assert torch.equal(model.lm_head.weight, head.float())
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight.half().float())
