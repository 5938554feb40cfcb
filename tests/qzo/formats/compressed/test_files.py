"""Checkpoints of compressed-tensors: through the commands, without the library, with tied heads, and damaged."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import pytest
import standin
import torch
from mutations import configure, mutate, refused_of
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, write_plain
from transformers import AutoModelForCausalLM

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.write import write_checkpoint
from qzo.commands.main import main
from qzo.live.scales import quantized_bytes

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
from cases_compressed import MIXED, group, read, write

Q_PROJ = "model.layers.0.self_attn.q_proj"
KINDS = {
    "packed": ([group(4, 32, asymmetric=True)], {}),
    "int8": ([group(8, format="int-quantized")], {}),
    "ordered": ([group(4, 32)], {"order": True}),
    "mixed": (list(MIXED), {}),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Kind -> folder of a sound checkpoint."""
    folder = tmp_path_factory.mktemp("compressed")
    plain = write_plain("llama", folder / "plain")
    for kind, (groups, options) in KINDS.items():
        write(groups, plain, folder / kind, **options)
        standin.write_tokenizer(folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def copied(originals, tmp_path):
    """`copied(kind)`: a copy to be damaged."""

    def copy(kind):
        return shutil.copytree(originals[kind], tmp_path / kind)

    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_commands_write_the_same_files_with_other_scales(originals, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "qzo.tasks", standin.module())
    folder, run = originals[kind], tmp_path / "run"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = ["train", str(folder), *standin.PAPER, "--steps", "4", "--lr", "1e-3", "--relative"]
    assert main([*command, "--out", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--state", "last"]) == 0
    assert main(["replay", str(folder), str(run / "run.journal"), str(tmp_path / "replayed")]) == 0
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}
    old, new, replayed = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "out", tmp_path / "replayed")
    )
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        name for name in old if name.endswith(".weight_scale")
    }
    assert all(torch.equal(replayed[name], new[name]) and old[name].dtype == new[name].dtype for name in new)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_what_the_loaded_model_holds(originals, kind, capsys):
    found, model = inspect(originals[kind]), qzo.load(originals[kind], torch.float32)
    sizes = quantized_bytes(model)
    assert found.reason is None and found.format == "compressed-tensors" and found.layers == 14
    for part in ("scales", "codes", "zero_points", "g_idx"):
        assert found.sizes.get(part, 0) == sizes.get(part, 0), part
    assert found.counts["scales"] == found.trainable["scales"] == sizes["scale_count"]
    assert found.counts["zero_points"] == (found.counts["scales"] if kind == "packed" else found.counts["zero_points"])
    assert found.counts["codes"] == sum(layer.in_features * layer.out_features for layer in quantized(model))
    assert (found.n_bits, found.group_size) == {"packed": (4, 32), "ordered": (4, 32), "int8": (8, None)}.get(
        kind, (None, None)
    )
    assert main(["inspect", str(originals[kind])]) == 0
    told = capsys.readouterr().out
    assert "trains with QZO       yes" in told and "zero points are whole numbers and move with" in told


def quantized(model):
    return [module for module in model.modules() if hasattr(module, "scheme")]


def test_every_layer_has_the_scheme_of_its_group(originals):
    model = qzo.load(originals["mixed"], torch.bfloat16)
    kinds = {path: (layer.n_bits, layer.type_name, tuple(layer.scales.shape)) for path, layer in quantized_of(model)}
    assert kinds["model.layers.0.mlp.down_proj"] == (8, "naive-quantized", (64, 1))
    assert kinds["model.layers.1.mlp.up_proj"] == (8, "naive-quantized", (160, 1))
    assert kinds["model.layers.1.mlp.gate_proj"] == (4, "pack-quantized", (160, 2))
    assert kinds["model.layers.1.self_attn.v_proj"] == (2, "pack-quantized", (32, 4))
    assert kinds["model.layers.1.self_attn.k_proj"] == (8, "pack-quantized", (1,))
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in qzo.scales(model).values()} == {torch.float32}  # as stored


def quantized_of(model):
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "scheme")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_sixteen_bits_and_a_head_that_is_the_embedding(tmp_path, input_ids, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tied=True), dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    write([group(4, 32)], tmp_path / "plain", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    model = qzo.load(tmp_path / "model", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {tensor.dtype for tensor in qzo.scales(model).values()} == {dtype}
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids).logits, read(tmp_path / "model")(input_ids).logits, rtol=0, atol=0.01
        )
    write_checkpoint(tmp_path / "model", qzo.scales(model), tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head_is_its_own_even_where_config_ties_it(tmp_path, input_ids, tied):
    AutoModelForCausalLM.from_config(tiny_config("llama", tied)).save_pretrained(tmp_path / "plain")
    write([group(4, 32)], tmp_path / "plain", tmp_path / "model", ignore=())
    model = qzo.load(tmp_path / "model", torch.float32)
    assert "lm_head.scales" in qzo.scales(model)
    expected = read(tmp_path / "model")(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=1e-4)
    write([group(4, 32, targets=["Embedding", "Linear"])], tmp_path / "plain", tmp_path / "embedded")
    with pytest.raises(qzo.QzoError, match="embed_tokens is a quantized Embedding; only linear layers are trained"):
        qzo.load(tmp_path / "embedded")


def test_shards_and_settings_of_older_versions_are_read(copied, input_ids):
    """Groups without a format of their own, a status that is not "compressed", numbers of a shape in int32."""
    folder = copied("packed")
    expected = qzo.load(folder, torch.float32)(input_ids).logits
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, parts = sorted(tensors), {}
    for number in (0, 1):
        file = f"model-{number}.safetensors"
        own = {name: tensors[name].int() if name.endswith("_shape") else tensors[name] for name in names[number::2]}
        save_file(own, folder / file, {"format": "pt"})
        parts |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))

    def older(config):
        settings = config["quantization_config"]
        del settings["config_groups"]["group_0"]["format"], settings["transform_config"], settings["version"]
        settings |= {"quantization_status": "frozen", "ignore": ["re:.*lm_head"]}

    configure(folder, older)
    assert torch.equal(qzo.load(folder, torch.float32)(input_ids).logits, expected)


def test_reading_training_and_writing_need_no_library(originals, tmp_path):
    """Nor is it imported where it is installed; and nothing is told on stderr."""
    code = f"""
import sys, torch, qzo
from qzo.commands.main import main
for name in {list(KINDS)!r}:
    folder = {str(originals["packed"].parent)!r} + "/" + name
    model = qzo.load(folder, torch.float32)
    ids = torch.arange(5, 17)[None]
    qzo.QZO(qzo.scales(model), lr=1e-4, eps=1e-4).step(lambda: model(ids, labels=ids).loss)
    assert main(["inspect", folder]) == main(["export", folder, {str(tmp_path)!r} + "/" + name]) == 0
assert not {{"compressed_tensors", "loguru"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_tensors_without_a_place_are_refused_and_nothing_is_left(originals, tmp_path):
    for tensors in ({f"{Q_PROJ}.scales": torch.ones(3)}, {"strange.scales": torch.ones(3)}):
        with pytest.raises(qzo.QzoError) as caught:
            write_checkpoint(originals["packed"], tensors, tmp_path / "out")
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def put(**parts):
    """Replace tensors of one layer; None takes one out."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in parts.items():
            tensors.pop(f"{Q_PROJ}.{name}", None)
            if tensor is not None:
                tensors[f"{Q_PROJ}.{name}"] = tensor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def setting(**changes):
    return lambda folder: configure(folder, lambda config: config["quantization_config"].update(changes))


def model(**changes):
    return lambda folder: configure(folder, lambda config: config.update(changes))


def weights(**changes):
    def change(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return lambda folder: configure(folder, change)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20000])


def without_codes(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "proj" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


WORDS = torch.zeros(64, 8, dtype=torch.int32)
SIZES, WIDER = torch.tensor([64, 64]), torch.tensor([64, 96])
NO_ORDER = torch.zeros(64, dtype=torch.int32)
DAMAGE = [
    ("packed", "is damaged", truncate),
    ("packed", "no tensor holds codes, and config.json says compressed-tensors", without_codes),
    ("packed", f"{Q_PROJ}: weight_packed is missing", put(weight_packed=None)),
    ("packed", f"{Q_PROJ}: weight_scale is missing", put(weight_scale=None)),
    ("packed", f"{Q_PROJ}: weight_shape is missing", put(weight_shape=None)),
    ("packed", f"{Q_PROJ}: weight_zero_point is missing", put(weight_zero_point=None)),
    ("packed", f"{Q_PROJ}: weight_packed is torch.int32 (64, 7), but", put(weight_packed=WORDS[:, :7].contiguous())),
    ("packed", f"{Q_PROJ}: weight_packed is torch.int64 (64, 8), but", put(weight_packed=WORDS.long())),
    ("packed", f"{Q_PROJ}: weight_zero_point is torch.int32 (64, 8)", put(weight_zero_point=WORDS)),
    ("packed", f"{Q_PROJ}: weight_scale is torch.float32 (64, 3)", put(weight_scale=torch.ones(64, 3))),
    ("packed", f"{Q_PROJ}.weight_shape does not hold the two sizes", put(weight_shape=torch.ones(3))),
    ("packed", f"{Q_PROJ}.weight_shape does not hold the two sizes", put(weight_shape=-SIZES)),
    ("packed", f"{Q_PROJ}: weight_packed is torch.int32 (64, 8), but a weight (64, 96)", put(weight_shape=WIDER)),
    ("packed", f"{Q_PROJ}: input_scale has no place beside 4-bit codes", put(input_scale=torch.ones(1))),
    ("packed", f"{Q_PROJ}: weight_g_idx has no place", put(weight_g_idx=NO_ORDER)),
    ("packed", f"{Q_PROJ}: the bias has shape (3,)", put(bias=torch.ones(3))),
    ("packed", 'it has codes, but "ignore" in quantization_config has Linear', setting(ignore=["Linear"])),
    ("packed", f'{Q_PROJ}: it has codes, but "ignore"', setting(ignore=["re:.*q_proj"])),
    ("packed", "kv_cache_scheme: keys and values are quantized too", setting(kv_cache_scheme={"num_bits": 8})),
    ("packed", "config_groups is not a JSON object", setting(config_groups=[])),
    ("packed", "rows of 160 weights are not divisible into groups of 48", weights(group_size=48)),
    ("packed", "is torch.int32 (64, 20), but a weight (64, 160) of 8 bits", weights(num_bits=8)),
    ("packed", "weight_zero_point has no place beside", weights(symmetric=True)),
    ("packed", 'strategy="block" is not supported', weights(strategy="block")),
    ("packed", "weights, but the files hold", model(intermediate_size=10**9)),
    ("packed", "gate_proj: it is quantized as (160, 64), but config.json implies", model(intermediate_size=128)),
    ("int8", f"{Q_PROJ}: weight is missing, or no matrix", put(weight=None)),
    ("int8", f"{Q_PROJ}: weight is torch.float32 (64, 64), but", put(weight=torch.ones(64, 64))),
    ("int8", f"{Q_PROJ}: weight_scale is torch.float32 (64, 2)", put(weight_scale=torch.ones(64, 2))),
    ("ordered", f"{Q_PROJ}: weight_g_idx is missing", put(weight_g_idx=None)),
    ("ordered", f"{Q_PROJ}: weight_g_idx is torch.float32", put(weight_g_idx=torch.zeros(64))),
    (
        "ordered",
        f"{Q_PROJ}.weight_g_idx does not have each group",
        put(weight_g_idx=torch.zeros(64, dtype=torch.int32)),
    ),
    ("ordered", f"{Q_PROJ}.weight_g_idx does not have each group", put(weight_g_idx=torch.arange(64) % 3)),
]


@pytest.mark.parametrize(("kind", "message", "damage"), DAMAGE, ids=lambda v: v if isinstance(v, str) else "")
def test_damage_is_told_in_one_line_with_exit_code_two(copied, tmp_path, capsys, kind, message, damage):
    folder = copied(kind)
    damage(folder)
    with pytest.raises(qzo.QzoError) as caught:
        qzo.load(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--group-size", "32"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {caught.value}"]


def test_columns_that_the_library_left_unordered_are_in_order(copied, input_ids):
    folder = copied("ordered")
    for g_idx in (torch.full((64,), -1, dtype=torch.int32), torch.arange(64) // 32):
        put(weight_g_idx=g_idx)(folder)
        assert qzo.load(folder).get_submodule(Q_PROJ).g_idx.tolist() == [0] * 32 + [1] * 32


def test_inspect_tells_why_a_checkpoint_is_not_trained(copied, capsys):
    folder = copied("int8")
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    configure(
        folder,
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(input_activations=inputs),
    )
    assert "only weight-only quantization is trained" in inspect(folder).reason
    assert main(["inspect", str(folder)]) == 0
    assert "trains with QZO       no: quantization_config: config_groups: group_0: input_act" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_never_crash_hang_or_take_memory(copied, kind):
    folder, dice = copied(kind), random.Random(kind)
    assert 30 < refused_of(folder, 100, lambda _: mutate(folder, dice), qzo.load) < 100
