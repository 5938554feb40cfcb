"""GPTQ checkpoints as they are published, each against a dense fp32 model with the weights that its bits stand for."""

import json
import shutil

import pytest
import torch
from gptq_files import to_words
from published import coded, no_head, publish
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.write import write_tuned
from qzo.formats.gptq.layer import QuantLinear
from qzo.kernels.native import by_operators


def agrees(folder, reference, input_ids, dtype=torch.float32):
    """Whether what is loaded has the weights of the reference to the bit; returns the model."""
    assert inspect(folder).reason is None
    model = qzo.load(folder, dtype)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and ".experts." not in path:
            assert torch.equal(layer.dequantize(), reference.get_submodule(path).weight), path
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
        with by_operators():
            torch.testing.assert_close(model(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
    return model


def saved(model, folder, tmp_path, name="model.layers.0.mlp.down_proj.scales"):
    """What `qzo.save` writes after one layer's scales have changed, which are all that differ from `folder`."""
    qzo.scales(model)[name].mul_(1.25)
    qzo.save(model, tmp_path / "saved")
    old, new = (
        {k: v for f in sorted(place.glob("*.safetensors")) for k, v in load_file(f).items()}
        for place in (folder, tmp_path / "saved")
    )
    assert old.keys() == new.keys()
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    return {key for key, value in old.items() if not torch.equal(value, new[key])}


def test_without_g_idx_columns_are_in_their_own_order(make_model, tmp_path, input_ids):
    reference = publish(make_model(), tmp_path / "came", no_head, dropped=[".g_idx"])
    model = agrees(tmp_path / "came", reference, input_ids)
    assert saved(model, tmp_path / "came", tmp_path) == {"model.layers.0.mlp.down_proj.scales"}
    publish(make_model(), tmp_path / "order", no_head, dropped=[".g_idx"], settings={"desc_act": True})
    with pytest.raises(qzo.QzoError, match=r"14 tensors are missing, the first is .*g_idx; download all files again"):
        qzo.load(tmp_path / "order")


def test_symmetric_codes_of_autoround_have_scales_of_either_sign(make_model, tmp_path, input_ids):
    """Its scale is that of the largest weight, with its sign; the zero point stands at the middle."""
    folder = tmp_path / "came"
    reference = publish(make_model(), folder, no_head, dropped=[".g_idx"], settings={"sym": True, "iters": 200})
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    rows, columns = reference.get_submodule(name).weight.shape
    codes = torch.arange(16).repeat(rows * columns // 16).view(rows, columns)
    scale = torch.full_like(tensors[f"{name}.scales"], 0.01)
    scale[1] *= -1
    words = {"qweight": torch.from_numpy(to_words(codes.t().contiguous().numpy(), 4)), "scales": scale}
    words["qzeros"] = torch.full_like(tensors[f"{name}.qzeros"], 0x77777777)  # 8, minus 1
    tensors |= {f"{name}.{part}": tensor for part, tensor in words.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weight = (codes.float() - 8) * scale.float().t().repeat_interleave(32, 1)
    reference.get_submodule(name).weight.data = weight
    model = agrees(folder, reference, input_ids)
    (group,) = qzo.trainable(model)
    assert group["nonnegative"] is False
    optimizer = qzo.QZO(qzo.scales(model), lr=1e-6, eps=1e-4)
    optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
    assert float(qzo.scales(model)[f"{name}.scales"].min()) < -0.005
    write_tuned(str(folder), {f"{name}.scales": scale * 2}, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[f"{name}.scales"], scale * 2)


def test_autoround_names_itself_and_single_layers_in_its_own_words(make_model, tmp_path, input_ids):
    own = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 16}, "model.layers.1.mlp.up_proj": {"bits": 16}}
    words = {"bits": "n_bits", "group_size": "group_size"}

    def layers(path):
        if path == "lm_head" or path.endswith("layers.1.mlp.up_proj"):
            return None
        return {words[key]: value for key, value in own.get(path, {}).items()}

    about = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "extra_config": own}
    reference = publish(make_model(), tmp_path / "came", layers, dropped=[".g_idx"], settings=about)
    model = agrees(tmp_path / "came", reference, input_ids)
    assert len(qzo.scales(model)) == 13
    assert saved(model, tmp_path / "came", tmp_path) == {"model.layers.0.mlp.down_proj.scales"}
    file = tmp_path / "came/config.json"
    file.write_text(file.read_text().replace("auto_round:auto_gptq", "auto_round:exllamav2"))
    with pytest.raises(
        qzo.QzoError, match=r'"auto-round \(auto_round:exllamav2\)" is not supported; give a checkpoint'
    ):
        qzo.load(tmp_path / "came")


@pytest.mark.parametrize("seed", [None, 3])
def test_a_last_group_may_be_shorter(make_model, tmp_path, input_ids, seed):
    def layers(path):
        return None if path == "lm_head" else {"group_size": 48, "seed": seed}

    reference = publish(
        make_model(), tmp_path / "came", layers, settings={"group_size": 48, "desc_act": seed is not None}
    )
    model = agrees(tmp_path / "came", reference, input_ids)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.scales.shape == (4, 64) and layer.has_short_group and layer.act_order == (seed is not None)
    layer.scales.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(input_ids, labels=input_ids).loss, layer.scales)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize(
    ("rule", "own"),
    [
        ({r"+:.*down_proj.*": {"bits": 8}}, {"n_bits": 8}),
        ({r".*\.down_proj": {"group_size": 16}}, {"group_size": 16}),
        ({r"-:.*\.down_proj": {}}, None),
        ({r"+:model\.layers\.\d+\.mlp\.down_proj$": {"bits": 2, "group_size": -1}}, {"n_bits": 2, "group_size": -1}),
        ({r"layers.*down_proj": {"bits": 8}}, {}),  # matches from the start of the path, and so nothing
        ({r".*down_proj": {"bits": 8}, r".*": {"bits": 2}}, {"n_bits": 8}),  # the first that matches counts
    ],
)
def test_dynamic_gives_single_layers_settings_of_their_own(make_model, tmp_path, input_ids, rule, own):
    def layers(path):
        usual = {"n_bits": 2} if r".*" in rule else {}
        return None if path == "lm_head" else own if path.endswith("down_proj") else usual

    reference = publish(make_model(), tmp_path / "came", layers, settings={"dynamic": rule})
    model = agrees(tmp_path / "came", reference, input_ids)
    found = inspect(tmp_path / "came")
    weights = sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, QuantLinear))
    assert found.counts["codes"] == weights
    name = "model.layers.0.mlp.up_proj.scales"
    assert saved(model, tmp_path / "came", tmp_path, name) == {name}


def test_a_quantized_head_is_a_layer_like_others(make_model, tmp_path, input_ids):
    for tied in (False, True):
        folder = tmp_path / f"tied {tied}"
        reference = make_model(tied=tied)
        if tied:  # the embedding stays what it is
            reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
        reference = publish(reference, folder, settings={"lm_head": True})
        model = agrees(folder, reference, input_ids)
        assert isinstance(model.lm_head, QuantLinear) and len(qzo.scales(model)) == 15
        assert saved(model, folder, folder, "lm_head.scales") == {"lm_head.scales"}


def sharded(folder, base):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {f"{base}-0000{number}-of-00002.safetensors": sorted(tensors)[number - 1 :: 2] for number in (1, 2)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def single(folder, base):
    (folder / "model.safetensors").rename(folder / f"{base}.safetensors")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')


@pytest.mark.parametrize("layout", [sharded, single])
def test_weights_may_have_a_base_name_of_their_own(make_model, tmp_path, input_ids, layout):
    folder = tmp_path / "came"
    reference = publish(make_model(), folder, no_head)
    layout(folder, "gptq_model-4bit-32g")
    model = agrees(folder, reference, input_ids)
    assert saved(model, folder, tmp_path) == {"model.layers.0.mlp.down_proj.scales"}
    shutil.copyfile(next(folder.glob("gptq*.safetensors")), folder / "other.safetensors")
    if layout is single:
        with pytest.raises(qzo.QzoError, match=r"2 safetensors files .* leave only the files of one model"):
            qzo.load(folder)


def test_old_buffers_are_left_over_and_other_tensors_are_not(tmp_path, input_ids):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    mask = torch.ones(1, 1, 64, 64).tril().bool()
    old = {f"transformer.h.{n}.attn.bias": mask.clone() for n in range(2)}
    old |= {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}
    reference = publish(model, tmp_path / "came", lambda path: None, more=old)
    layers = {f"transformer.h.{n}.mlp.c_{part}" for n in range(2) for part in ("fc", "proj")}
    tensors = load_file(tmp_path / "came/model.safetensors")
    for path in layers:
        parts, dense = coded(tensors.pop(f"{path}.weight").t())
        tensors |= {f"{path}.{name}": part for name, part in parts.items()}
        reference.get_submodule(path).weight.data = dense.t()
    save_file(tensors, tmp_path / "came/model.safetensors", {"format": "pt"})
    found = qzo.load(tmp_path / "came", torch.float32)
    torch.testing.assert_close(found(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
    tensors["transformer.h.0.attn.bias"] = torch.ones(64)  # no mask
    tensors["transformer.h.0.extra.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "came/model.safetensors", {"format": "pt"})
    for told in (qzo.load, lambda folder: pytest.fail("loads") if inspect(folder).reason is None else qzo.load(folder)):
        with pytest.raises(
            qzo.QzoError, match=r"the model has no tensor transformer.h.0.extra.weight; .* one checkpoint"
        ):
            told(tmp_path / "came")


def test_layers_that_compute_as_nn_linear_are_quantized_and_read(tmp_path, input_ids):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FalconConfig(**sizes, new_decoder_architecture=True, num_kv_heads=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference = publish(model, tmp_path / "came", no_head)
    agrees(tmp_path / "came", reference, input_ids)
    dense = model(input_ids).logits
    assert len(qzo.scales(qzo.quantize(model, 8, 32))) == 8
    torch.testing.assert_close(model(input_ids).logits, dense, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("wrong", [[1], {"+:*": {}}, {"+:.*": 3}, {"+:.*": {"bits": "four"}}])
def test_a_dynamic_that_is_none_is_told(make_model, tmp_path, wrong):
    publish(make_model(), tmp_path / "came", no_head, settings={"dynamic": wrong})
    reason = inspect(tmp_path / "came").reason
    with pytest.raises(qzo.QzoError, match='"dynamic" in quantization_config') as caught:
        qzo.load(tmp_path / "came")
    assert reason is not None and reason in str(caught.value)
