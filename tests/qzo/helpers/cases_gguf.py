"""GGUF files of the types whose scales are plain numbers: made by the package gguf, read by transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from format_cases import FormatCase
from gguf_files import SIMPLE, stored_tensors, write_gguf
from optional import gguf
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel


def _write(kind: str, plain: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    write_gguf(model, out, kind)


def _dense(out: Path) -> PreTrainedModel:
    """The model as transformers rebuilds it, all weights in fp32."""
    options = {"gguf_file": out.name, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(out.parent, dtype=torch.float32, **options).eval()


def _parts(out: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensor of the file -> fp16 scales [N, K/32] and all other bytes of its blocks; plain ones have no scales."""
    parts = {}
    for name, stored in stored_tensors(out).items():
        data = torch.from_numpy(stored.data.copy())
        if stored.tensor_type.name not in SIMPLE:
            parts[name] = torch.empty(0), data
            continue
        blocks = data.view(data.shape[0], -1, gguf.GGML_QUANT_SIZES[stored.tensor_type][1])
        parts[name] = blocks[..., :2].contiguous().view(torch.float16)[..., 0], blocks[..., 2:]
    return parts


def _scales(out: Path) -> dict[str, Tensor]:
    config = _dense(out).config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layers = [
        *(f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"),
        *(f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")),
        *("model.embed_tokens", "lm_head"),
    ]
    parts, found = _parts(out), {}
    for path in layers:
        scales = parts[f"{names.get_name(path)}.weight"][0].float()
        count = heads.get(path.rpartition(".")[2])
        if count is not None:  # rows of the file stand pair by pair
            scales = scales.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        found[path] = scales
    return found


def _codes(out: Path) -> dict[str, Tensor]:
    return {name: rest for name, (_, rest) in _parts(out).items()}


def _logits(out: Path, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return _dense(out)(input_ids).logits


CASES = [
    FormatCase(
        name=f"gguf-{kind.lower()}",
        family="llama",
        write=partial(_write, kind),
        scales=_scales,
        logits=_logits,
        tolerance=1e-5,
        suffix=".gguf",
        codes=_codes,
    )
    for kind in SIMPLE
]
