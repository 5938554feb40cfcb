"""GPTQ checkpoints as people publish them, and for each a dense fp32 model with the weights of its bits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptq_files import to_words
from safetensors.torch import save_file
from torch import Tensor, nn

Settings = dict[str, Any]


def coded(
    weight: Tensor, n_bits: int = 4, group_size: int = 32, seed: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """A weight [N, K] as the tensors of a layer in format "gptq", and the weight that they stand for.

    The last group is shorter where K asks for it; `seed` puts the columns in an order of their own.
    """
    columns, top = weight.detach().float().t().numpy(), 2**n_bits - 1  # [K, N]
    size = len(columns) if group_size == -1 else group_size
    g_idx = np.arange(len(columns)) // size
    if seed is not None:
        g_idx = g_idx[np.random.default_rng(seed).permutation(len(columns))]
    groups = g_idx.max() + 1
    low = np.stack([np.minimum(columns[g_idx == group].min(0), 0) for group in range(groups)])
    high = np.stack([np.maximum(columns[g_idx == group].max(0), 0) for group in range(groups)])
    scale = np.maximum((high - low) / top, 1e-4).astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 1, top).astype(np.int64)
    codes = np.clip(np.rint(columns / scale[g_idx]) + zero[g_idx], 0, top).astype(np.int64)
    tensors = {
        "qweight": torch.from_numpy(to_words(codes, n_bits)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(to_words(np.ascontiguousarray((zero - 1).T), n_bits).T)),
        "scales": torch.from_numpy(scale.astype(np.float16)),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    return tensors, torch.from_numpy(np.ascontiguousarray(((codes - zero[g_idx]).astype(np.float32) * scale[g_idx]).T))


def publish(
    model: nn.Module,
    folder: Path,
    layers: Callable[[str], Settings | None] = lambda path: {},
    renamed: Callable[[str], str] = lambda name: name,
    settings: Settings | None = None,
    config: Any = None,
    more: dict[str, Tensor] | None = None,
    dropped: Iterable[str] = (),
    file: str = "model.safetensors",
) -> nn.Module:
    """Write a model's folder; returns the reference, with the weights of the codes.

    Args:
        model: fp32, its linear layers and stacked experts are quantized; the head where `layers` asks for it.
        folder: to write.
        layers: path of a linear layer (of experts "path.experts.3.gate_proj") -> arguments of `coded`, None for none.
        renamed: name of a tensor in the model (of experts as above) -> in the file.
        settings: beside bits 4 and group size 32.
        config: of another model, which goes into config.json.
        more: further tensors of the file.
        dropped: ends of names of tensors that are left out.
        file: its name.
    """
    reference, tensors, done = copy.deepcopy(model), {}, set()
    for path, module in reference.named_modules():
        if isinstance(module, nn.Linear):
            own = layers(path)
            if own is not None:
                parts, module.weight.data = coded(module.weight, **own)
                tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}
                done.add(f"{path}.weight")
        elif hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
            for expert in range(len(module.gate_up_proj)):
                gate, up = module.gate_up_proj.data[expert].chunk(2)
                for name, part in (("gate_proj", gate), ("up_proj", up), ("down_proj", module.down_proj.data[expert])):
                    own = layers(f"{path}.{expert}.{name}")
                    if own is None:
                        tensors[f"{path}.{expert}.{name}.weight"] = part.half().clone()
                        part.copy_(part.half())
                        continue
                    parts, dense = coded(part, **own)
                    part.copy_(dense)
                    tensors |= {f"{path}.{expert}.{name}.{one}": tensor for one, tensor in parts.items()}
            done |= {f"{path}.gate_up_proj", f"{path}.down_proj"}
    for name, tensor in reference.state_dict().items():
        if name not in done:
            tensor.copy_(tensor.half())
            tensors[name] = tensor.half().clone()
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    tensors = {renamed(name): tensor for name, tensor in tensors.items() if not name.endswith(tuple(dropped))}
    written = json.loads((config or model.config).to_json_string(use_diff=True)) | {"dtype": "float16"}
    about = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    written["quantization_config"] = about | (settings or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written))
    save_file({**tensors, **(more or {})}, folder / file, {"format": "pt"})
    return reference


def no_head(path: str) -> Settings | None:
    """Every linear layer but the output head."""
    return None if path == "lm_head" else {}
