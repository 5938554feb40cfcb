"""Of a multimodal model that is loaded whole, unquantized, text trains the text part: towers stay as they are."""

import csv

import pytest
import standin
import torch
from mixtures import TEXT
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import qzo
from qzo.commands.main import main
from qzo.models.prefix import decoder_layers
from qzo.models.towers import towers, within
from qzo.quantizers.aqlm import quantize_random

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PARTS = ("model.vision_tower", "model.multi_modal_projector")


@pytest.fixture
def source(tmp_path):
    """A folder of Gemma 3 with its tower and a tokenizer."""
    text = {**TEXT, "head_dim": 16, "sliding_window": 8}
    config = Gemma3Config(text_config=text, vision_config={**VISION, "image_size": 16, "patch_size": 8})
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    standin.write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    """Texts with two labels."""
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"w{8 + n} w{9 + n % 9}", f"w{4 + n % 2}"] for n in range(30))
    return tmp_path / "rows.csv"


def in_towers(folder):
    return {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if any(part in name for part in ("vision_tower", "multi_modal_projector"))
    }


def test_towers_are_the_parts_beside_the_text_and_a_text_model_has_none(source, make_model):
    model = qzo.load(source)
    assert set(towers(model)) == set(PARTS) and towers(make_model()) == ()
    assert decoder_layers(model)[0] is model.model.language_model.layers[0]
    assert within("model.vision_tower", PARTS) and not within("model.vision_tower_of_another", PARTS)


@pytest.mark.parametrize("method", ["rtn", "gptq", "aqlm"])
def test_the_text_part_is_quantized_and_towers_stay_in_16_bits(source, input_ids, method, caplog, tmp_path):
    model = qzo.load(source)
    if method == "aqlm":
        quantize_random(model)
    else:
        qzo.quantize(model, method=method, group_size=32, calibration=[input_ids] if method == "gptq" else None)
    assert "model.vision_tower.encoder.layers.*.self_attn.k_proj (no part of the language model)" in caplog.text
    names = {name for name, module in model.named_modules() if hasattr(module, "views")}
    assert len(names) == 14 and all("language_model.layers" in name for name in names)
    if method == "rtn":
        qzo.save(model, tmp_path / "out")
        assert standin.same(in_towers(tmp_path / "out"), in_towers(source))


def test_a_tower_that_is_asked_for_is_quantized_and_no_scale_of_it_is_trained(source):
    only = ["vision_tower", "language_model"]
    model = qzo.quantize(qzo.load(source), group_size=32, only=only)
    assert any("vision_tower" in name for name, module in model.named_modules() if hasattr(module, "views"))
    assert len(qzo.scales(model)) == 14 and all("language_model" in name for name in qzo.scales(model))
    groups = qzo.trainable(model, "scales+unquantized")
    assert not any(within(name, PARTS) for group in groups for name in group["params"])


@pytest.mark.parametrize(("method", "more"), [("mezo", []), ("mezo", ["--layers", "1-1"]), ("ft", []), ("lora", [])])
def test_a_run_leaves_towers_as_they_were(source, data, tmp_path, method, more):
    run = tmp_path / "run"
    lr = {"mezo": "1e-3"}.get(method, "1e-2")
    command = ["train", source, "--method", method, "--data", data, "--out", run, "--steps", "2", "--eval-every", "2"]
    command += ["--batch-size", "4", "--preset", "paper", "--max-length", "32", "--lr", lr, *more]
    assert main([str(word) for word in command]) == 0
    trained = set(load_file(run / "best.safetensors"))
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    if method != "lora":
        assert main(["export", str(run), str(tmp_path / "out")]) == 0
        assert standin.same(in_towers(tmp_path / "out"), in_towers(source))


def test_a_multimodal_model_that_is_no_language_model_of_transformers_is_refused_as_what_it_is(tmp_path):
    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT))).save_pretrained(
        tmp_path / "model"
    )
    told = r'model_type "llava" is a multimodal model, .*; give its text model alone, or a quantized one'
    with pytest.raises(qzo.QzoError, match=told):
        qzo.load(tmp_path / "model")
    assert "is a multimodal model" in qzo.inspect(tmp_path / "model").reason
