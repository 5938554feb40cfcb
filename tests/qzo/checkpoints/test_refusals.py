"""Every refusal of a checkpoint names its cause and what would help, in `inspect` as in `load`."""

import json
import re

import pytest
import torch
from awq_files import write_awq
from gptq_files import write_gptq
from safetensors.torch import load_file, save_file

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.errors import AGAIN, OTHER

Q_PROJ = "model.layers.0.self_attn.q_proj"
VERBS = "take|download|copy|mend|give|convert|add|remove|save|quantize|check|choose|leave|load|merge|write|shorten|join"
HELPS = re.compile(rf"[;:] ({VERBS}) ")
ONE = "one checkpoint"


def config(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        settings = changes.pop("quantization", None)
        if isinstance(settings, dict):
            content["quantization_config"] |= settings
        content |= changes
        (folder / "config.json").write_text(json.dumps(content))

    return change


def tensors(change):
    def rewrite(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def settings(**own):
    """Those of another quantizer, on the tensors there are."""
    return config(quantization_config=own)


def drop(name):
    return tensors(lambda found: found.pop(name))


def put(**own):
    return tensors(lambda found: found.update({name.replace("__", "."): value for name, value in own.items()}))


def renamed(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def encoded(name, encoding):
    """A file in another encoding, its mark in front."""

    def change(folder):
        content = (folder / name).read_text() if (folder / name).exists() else "{}"
        (folder / name).write_text(content, encoding=encoding)

    return change


def adapters(folder):
    """As peft saves them, beside a model."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def two_unnamed(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())


def group(**weights):
    """Settings of compressed-tensors with one group."""
    own = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": own | weights}}
    return settings(quant_method="compressed-tensors", format="pack-quantized", config_groups=groups)


GPTQ = [
    (config(quantization={"bits": 5}), "n_bits=5 is not supported", "choose 2, 3, 4 or 8"),
    (config(quantization={"bits": None}), "must have whole numbers bits and group_size", "mend config.json"),
    (config(quantization={"group_size": 64}), r"qzeros is I32 .* \(by bits, group_size", ONE),
    (config(quantization={"bits": 8}), r"is I32 .* but config.json implies I32 .* \(by bits", ONE),
    (
        config(quantization={"checkpoint_format": "marlin"}),
        'checkpoint_format="marlin" is not',
        "save it so with gptqmodel",
    ),
    (
        config(quantization={"dynamic": {"-:.*q_proj": {}}}),
        r'"dynamic" in .* says that it has none \("-:\.\*q_proj"\)',
        ONE,
    ),
    (
        config(quantization={"dynamic": {"+:(": {}}}),
        '"dynamic" in quantization_config: .* no regular expression',
        "mend it",
    ),
    (
        config(quantization={"dynamic": []} | {"dynamic": [1]}),
        '"dynamic" in quantization_config is not an object',
        "mend",
    ),
    (config(quantization_config="gptq"), "quantization_config in config.json is not a JSON object", "mend config.json"),
    (config(num_hidden_layers=1), "is of layer 1, but config.json implies layers 0 ... 0 only", ONE),
    (config(num_hidden_layers=3), r"tensors are missing, the first is model.layers.2", "download all files again"),
    (config(num_hidden_layers=10**6), "config.json has num_hidden_layers=1000000, but there are only", ONE),
    (config(intermediate_size=10**7), "implies more than .* weights, but the files hold", ONE),
    (config(hidden_size=60), r"config.json implies|multiple of 8", "one checkpoint|choose"),
    (config(dtype="int8"), 'dtype "int8" in config.json is not known', "mend config.json"),
    (config(model_type="nothing"), "nothing", "mend config.json, or give a causal language model"),
    (config(model_type="nothing", auto_map={}), "asks for code of its own", "give a model of a known architecture"),
    (drop(f"{Q_PROJ}.scales"), "1 tensors are missing, the first is .*q_proj.scales", "download all files again"),
    (put(strange=torch.ones(2)), "the model has no tensor strange", ONE),
    (put(strange__qweight=torch.ones(2).int()), "the model has no linear layer strange", ONE),
    (
        put(model__embed_tokens__qweight=torch.ones(2).int()),
        "is a quantized Embedding; only linear",
        "leaves it unquantized",
    ),
    (tensors(lambda found: found.update({f"{Q_PROJ}.g_idx": torch.full((64,), 9).int()})), "outside 0 ... 1", AGAIN),
    (renamed("model.bin"), "is a pickle, which can run code", "convert it with the software that wrote it"),
    (renamed("model.gone"), "has no model.safetensors and no model.safetensors.index.json", "download the weights too"),
    (two_unnamed, "has 2 safetensors files .* and not one index", "add model.safetensors.index.json, or leave only"),
    (
        lambda folder: [renamed("a.safetensors")(folder), text("model.safetensors.index.json", "{}")(folder)],
        "no weight_map",
        "again",
    ),
    (
        lambda folder: [
            renamed("a")(folder),
            text("x.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}')(folder),
        ],
        "x.safetensors.index.json names b.safetensors, which is not a file in that folder",
        "download it too",
    ),
    (
        lambda folder: (folder / "model.safetensors").write_bytes(b"123456789"),
        "has a header of .* more than any real one",
        "copy or download it again",
    ),
    (text("config.json", "{"), "config.json cannot be read", "copy or download it again"),
    (text("config.json", "[]"), "does not hold a JSON object", "copy or download it again"),
    (encoded("config.json", "utf-8-sig"), "config.json begins with a byte order mark", "save it as UTF-8 without one"),
    (encoded("generation_config.json", "utf-16"), "begins with a byte order mark", "save it as UTF-8 without one"),
    (text("generation_config.json", "{"), "generation_config.json: cannot be read", "mend it, or remove it"),
    (text("generation_config.json", '{"max_new_tokens": -1}'), "generation_config.json: ", "mend it, or remove it"),
    (text("generation_config.json", '{"temperature": NaN}'), "temperature is nan", "mend it, or remove it"),
    (adapters, "has adapter_config.json beside a model", "away to have the model without"),
    (
        lambda folder: [adapters(folder), (folder / "config.json").unlink()],
        "holds adapters without their model",
        "load the model they are for",
    ),
    (
        config(quantization={"dynamic": {"-:((.|..)+)+(?<!j)$": {}}}),
        r"the expression '-:.*' takes more than 0.5 s over the name .*_proj: its repeats nest",
        "write it without",
    ),
    (config(quantization={"dynamic": {"+:" + "a" * 2000: {}}}), "an expression of 2,002 characters", "shorten it"),
    (
        config(quantization={"dynamic": {f"+:{number}": {} for number in range(10_001)}}),
        '"dynamic" in quantization_config has 10,001 rules',
        "join them to 10,000 or fewer",
    ),
]
OTHERS = [
    (settings(quant_method="quanto"), "quanto", "take a checkpoint of a kind that|give a checkpoint of a format that"),
    (settings(quant_method="hqq"), "no tensor holds codes, and config.json says hqq", AGAIN),
    (settings(quant_method="torchao"), "no tensor holds codes, and config.json says torchao", AGAIN),
    (settings(quant_method="aqlm"), "AQLM with .* is not supported|no tensor holds codes", "take|choose"),
    (settings(quant_method="aqlm", num_codebooks=0), "AQLM with num_codebooks=0 is not supported", OTHER),
    (settings(quant_method="bitsandbytes"), "must have one of load_in_4bit and load_in_8bit", OTHER),
    (
        settings(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="x"),
        'bnb_4bit_quant_type="x"',
        OTHER,
    ),
    (settings(quant_method="bitsandbytes", load_in_8bit=True), "no tensor holds codes", ONE),
    (group(), "no tensor holds codes, and config.json says compressed-tensors", AGAIN),
    (group(type="float"), "weights of type float with 4 bits are not supported", OTHER),
    (group(num_bits=3), "weights of type int with 3 bits are not supported", OTHER),
    (group(strategy="block"), 'strategy="block" is not supported', OTHER),
    (group(group_size=0), "group_size=0 is not a positive number", OTHER),
    (group(dynamic=True), r"quantized anew in each forward \(dynamic\)", OTHER),
    (settings(quant_method="compressed-tensors"), "config_groups is not a JSON object with groups", OTHER),
    (settings(quant_method="compressed-tensors", kv_cache_scheme={}), "kv_cache_scheme: keys and values are", OTHER),
    (put(**{f"{Q_PROJ}.qweight": torch.ones(4, 4).int()}), r"q_proj.qweight is I32 \(4, 4\), but config.json", ONE),
]
AWQ = [
    (config(quantization={"version": "gemv"}), 'AWQ version="gemv" is not supported', OTHER),
    (config(quantization={"bits": 8}), "AWQ with bits=8 is not supported", OTHER),
    (config(quantization={"zero_point": False}), "AWQ with zero_point=false is not supported", OTHER),
    (config(quantization={"group_size": 48}), "in_features=64 is not divisible by group_size=48, which no AWQ", ONE),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sound checkpoint of each writer, to be copied."""
    from tiny_models import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tied=False), dtype=torch.float32)
    place = tmp_path_factory.mktemp("sound")
    return {"gptq": write_gptq(model, place / "gptq", 4), "awq": write_awq(model, place / "awq")}


@pytest.mark.parametrize(
    ("kind", "provoke", "cause", "remedy"),
    [("gptq", *row) for row in (*GPTQ, *OTHERS)] + [("awq", *row) for row in AWQ],
)
def test_a_refusal_names_its_cause_and_what_helps(folders, tmp_path, kind, provoke, cause, remedy):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folders[kind].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    provoke(folder)
    with pytest.raises(qzo.QzoError) as caught:
        qzo.load(folder)
    told = str(caught.value)
    try:
        inspected = inspect(folder).reason
    except qzo.QzoError as error:
        inspected = str(error)
    of_data = "has values outside" in told  # which inspect does not read
    assert (inspected is None) == of_data
    remedies = remedy.split("|") if remedy not in (AGAIN, OTHER) else [remedy]
    for message in (told, *([] if inspected is None else [inspected])):
        assert "\n" not in message and re.search(cause, message) and HELPS.search(message), message
    assert any(one in told for one in remedies), told


def test_a_folder_without_a_model_says_what_is_wanted(tmp_path):
    for reads in (qzo.load, qzo.inspect):
        with pytest.raises(
            qzo.QzoError, match=r"config\.json cannot be read: .*; give a folder with a whole config\.json"
        ):
            reads(tmp_path)
