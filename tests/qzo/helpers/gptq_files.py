"""GPTQ checkpoints written and read as streams of bits, after the layout's definition; no code of the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def to_words(codes: np.ndarray, n_bits: int) -> np.ndarray:
    """Codes [R, M], each column one stream of bits, lowest first -> int32 words [R * n_bits / 32, M]."""
    bits = (codes[:, None] >> np.arange(n_bits)[:, None]) & 1  # [R, b, M]
    stream = bits.reshape(-1, codes.shape[1]).T.astype(np.uint8)
    packed = np.packbits(np.ascontiguousarray(stream), axis=1, bitorder="little")
    return packed.view("<i4").T.copy()


def from_words(words: np.ndarray, n_bits: int) -> np.ndarray:
    """int32 words [P, M] -> codes [P * 32 / n_bits, M]."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    return (stream.reshape(len(stream), -1, n_bits) * (1 << np.arange(n_bits))).sum(2).T


def gptq_tensors(weight: Tensor, n_bits: int, group_size: int, version: str, act_order: bool) -> dict[str, Tensor]:
    """A weight [N, K] rounded to nearest, asymmetric, as the four tensors of a layer."""
    columns, top = weight.t().float().numpy(), 2**n_bits - 1  # [K, N]
    order = torch.randperm(len(columns)).numpy() if act_order else np.arange(len(columns))
    g_idx = np.empty(len(columns), np.int32)
    g_idx[order] = np.arange(len(columns)) // group_size
    grouped = columns[order].reshape(-1, group_size, columns.shape[1])
    low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
    scale = np.maximum((high - low) / top, 1e-4).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 1, top).astype(np.int64)  # 0 is not in every version
    codes = np.clip(np.rint(columns / scale.astype(np.float32)[g_idx]) + zero[g_idx], 0, top).astype(np.int64)
    stored = zero - 1 if version == "gptq" else zero
    return {
        "qweight": torch.from_numpy(to_words(codes, n_bits)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(to_words(np.ascontiguousarray(stored.T), n_bits).T)),
        "scales": torch.from_numpy(scale),
        "g_idx": torch.from_numpy(g_idx),
    }


def slow_weight(tensors: dict[str, Tensor], path: str, n_bits: int, version: str) -> Tensor:
    """[N, K] of a layer of a checkpoint, fp32."""
    part = {name: tensors[f"{path}.{name}"].numpy() for name in ("qweight", "qzeros", "scales", "g_idx")}
    zeros = from_words(np.ascontiguousarray(part["qzeros"].T), n_bits).T + (version == "gptq")
    groups = part["g_idx"].astype(np.int64)
    codes = from_words(part["qweight"], n_bits)
    weight = (codes - zeros[groups]).astype(np.float32) * part["scales"].astype(np.float32)[groups]
    return torch.from_numpy(np.ascontiguousarray(weight.T))


def write_gptq(
    model: nn.Module, folder: Path, n_bits: int, group_size: int = 32, version: str = "gptq", act_order: bool = False
) -> Path:
    """A model's folder as gptqmodel lays it out."""
    head = model.get_output_embeddings()
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            parts = gptq_tensors(module.weight.detach(), n_bits, group_size, version, act_order)
            tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}
    for name, tensor in model.state_dict().items():
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not tied and f"{name.removesuffix('.weight')}.qweight" not in tensors:
            tensors[name] = tensor.half().clone()
    config = json.loads(model.config.to_json_string(use_diff=True)) | {"dtype": "float16"}
    settings = {"bits": n_bits, "group_size": group_size, "desc_act": act_order, "sym": False, "lm_head": False}
    config["quantization_config"] = {"quant_method": "gptq", "checkpoint_format": version, **settings}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
