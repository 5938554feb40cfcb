"""AWQ checkpoints written number by number from the layout's definition; shares no code with the package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, lowest first


def slow_words(codes: list[list[int]]) -> Tensor:
    """Rows of codes, [R][N] -> int32 words [R, N/8]."""
    words = []
    for row in codes:
        values = []
        for start in range(0, len(row), 8):
            digits = [row[start + column] for column in ORDER]
            value = int("".join(f"{digit:x}" for digit in reversed(digits)), 16)
            values.append(value - 2**32 if value >= 2**31 else value)
        words.append(values)
    return torch.tensor(words, dtype=torch.int32)


def slow_codes(words: Tensor) -> Tensor:
    """int32 words [R, W] -> codes [R, 8 W]."""
    rows = []
    for row in words.tolist():
        codes = []
        for word in row:
            digits = [int(digit, 16) for digit in reversed(f"{word % 2**32:08x}")]
            by_column = dict(zip(ORDER, digits, strict=True))
            codes += [by_column[column] for column in range(8)]
        rows.append(codes)
    return torch.tensor(rows)


def slow_weight(tensors: dict[str, Tensor], path: str) -> Tensor:
    """[N, K] of a layer of a checkpoint, fp32."""
    scale = tensors[f"{path}.scales"].float()  # [K/g, N]
    codes, zeros = slow_codes(tensors[f"{path}.qweight"]), slow_codes(tensors[f"{path}.qzeros"])
    size = len(codes) // len(scale)
    return ((codes - zeros.repeat_interleave(size, 0)).float() * scale.repeat_interleave(size, 0)).t()


def awq_tensors(weight: Tensor, path: str, group_size: int) -> dict[str, Tensor]:
    """A weight [N, K] rounded to nearest, asymmetric, as the three tensors of a layer."""
    grouped = weight.float().t().unflatten(0, (-1, group_size))  # [K/g, g, N]
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (grouped / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15).flatten(0, 1)
    return {
        f"{path}.qweight": slow_words(codes.int().tolist()),
        f"{path}.qzeros": slow_words(zero.int().tolist()),
        f"{path}.scales": scale,
    }


def write_awq(model: nn.Module, folder: Path, group_size: int = 32, skip: tuple[str, ...] = (), **settings) -> Path:
    """A model's folder as AutoAWQ lays it out; layers whose path holds one of `skip` stay as they are."""
    tensors = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module is not head and not any(part in path for part in skip):
            tensors |= awq_tensors(module.weight.detach(), path, group_size)
            if module.bias is not None:
                tensors[f"{path}.bias"] = module.bias.detach().half()
    for name, tensor in model.state_dict().items():
        path = name.rpartition(".")[0]
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if f"{path}.qweight" not in tensors and not tied:
            tensors[name] = tensor.half().clone()
    config = json.loads(model.config.to_json_string(use_diff=True)) | {"dtype": "float16"}
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skip) or None,
        **settings,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
