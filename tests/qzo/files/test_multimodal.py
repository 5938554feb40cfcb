"""Multimodal models: their text part is trained, the tower stays in its file."""

import json
import re

import pytest
import torch
from mixtures import MIXTURES, TEXT
from published import publish
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
    Qwen3VLMoeConfig,
)

import qzo
from qzo.checkpoints.inspect import inspect

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
GEMMA = {**TEXT, "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True}
QWEN = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    "max_position_embeddings": 64,
}
OLD = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head": "language_model.lm_head",
    r"^model\.(vi|mu)": r"\1",
}
MULTIMODAL = {
    "llava": (lambda: LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIP, tie_word_embeddings=False), {}),
    "llava, old names": (
        lambda: LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIP, tie_word_embeddings=False),
        OLD,
    ),
    "gemma 3": (
        lambda: Gemma3Config(text_config=GEMMA, vision_config={**VISION, "image_size": 16, "patch_size": 8}),
        {},
    ),
    "gemma 3, old names": (
        lambda: Gemma3Config(text_config=GEMMA, vision_config={**VISION, "image_size": 16, "patch_size": 8}),
        OLD,
    ),
    "qwen 2.5 vl": (
        lambda: Qwen2_5_VLConfig(
            text_config=QWEN,
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
            },
            tie_word_embeddings=False,
        ),
        {r"^model\.language_model\.": "model.", r"^model\.visual": "visual"},
    ),
    "qwen 3 vl, experts": (
        lambda: Qwen3VLMoeConfig(
            text_config=QWEN | MIXTURES["qwen3"][1],
            vision_config={
                **{"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
                **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            },
            tie_word_embeddings=False,
        ),
        {},
    ),
    "mllama, old names": (
        lambda: MllamaConfig(
            text_config=TEXT | {"cross_attention_layers": [0], "pad_token_id": 0},
            vision_config={
                **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1},
                **{"attention_heads": 2, "vision_output_dim": 64, "image_size": 16, "patch_size": 8},
                **{"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]},
            },
        ),
        OLD,
    ),
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_of_a_multimodal_model_the_text_part_is_trained_and_the_tower_stays_in_its_file(tmp_path, input_ids, kind):
    make, names = MULTIMODAL[kind]

    def renamed(name):
        for pattern, new in names.items():
            name, found = re.subn(pattern, new, name)
            if found:
                return name
        return name

    def text_alone(path):
        return {} if "language_model.layers" in path and not path.endswith("gate") else None

    config, folder = make(), tmp_path / "came"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    reference = publish(model, folder, text_alone, renamed)
    assert inspect(folder).reason is None
    found = qzo.load(folder, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids).logits, reference(input_ids).logits, rtol=1e-4, atol=1e-5)
    mixture = kind.endswith("experts")
    assert len(qzo.scales(found)) == (32 if mixture else 14) and found.name_or_path == str(folder)
    assert not any("vi" in name for name, _ in found.named_parameters())
    last, own = ("experts.up_proj.2", "experts.2.up_proj") if mixture else ("up_proj", "up_proj")
    name = next(name for name in qzo.scales(found) if name.endswith(f"layers.1.mlp.{last}.scales"))
    qzo.scales(found)[name].mul_(1.25)
    qzo.save(found, tmp_path / "saved")
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    changed = {key for key, value in old.items() if not torch.equal(value, new[key])}
    assert old.keys() == new.keys()
    assert changed == {renamed(f"model.language_model.layers.1.mlp.{own}.scales")}
    written = json.loads((folder / "config.json").read_text())
    written["text_config"]["num_hidden_layers"] = 1
    written["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(qzo.QzoError, match=r"is of layer 1, but config.json implies layers 0 ... 0 only"):
        qzo.load(folder)
