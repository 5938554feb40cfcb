"""Checkpoints in the GPTQ layout, written and read with safetensors alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qzo.embedding import QuantEmbedding
from qzo.errors import QzoError, named
from qzo.linear import QuantLinear
from qzo.packing import zeros_to_v1

FORMATS = ("gptq", "gptq_v2")
WEIGHTS = "model.safetensors"
QUANTIZE_CONFIG = "quantize_config.json"  # where AutoGPTQ and gptqmodel look first


def save(model: nn.Module, folder: str | os.PathLike[str], checkpoint_format: str = "gptq") -> None:
    """Write `config.json`, `quantize_config.json` and `model.safetensors` of a quantized model, in the GPTQ layout.

    The files are written to a folder beside `folder`, which is renamed when they are complete. Tokenizer and
    generation config are not written. Tensors that share memory are written once, under their first name. The
    experts of mixture models have names of this package's own, which other GPTQ readers do not know.

    Args:
        model: a transformers model with QuantLinear layers, all of one `n_bits` and `group_size`.
        folder: must not exist, or be empty.
        checkpoint_format: "gptq" stores zero points minus 1 (what most readers expect), "gptq_v2" as they are.

    Extra memory: one copy of the packed zero points.

    Raises:
        QzoError: a folder with something in it, a model that the layout cannot hold.
    """
    target = Path(folder)
    if checkpoint_format not in FORMATS:
        raise QzoError(f'checkpoint_format="{checkpoint_format}" is not known; choose "gptq" or "gptq_v2"')
    check_target(target)
    config = _config(model, checkpoint_format)
    tensors = _tensors(model, checkpoint_format)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.part"
    partial.mkdir()
    try:
        from safetensors.torch import save_file

        for name, content in (("config.json", config), (QUANTIZE_CONFIG, config["quantization_config"])):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod((partial / "config.json").stat().st_mode)  # safetensors makes it private
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def format_of(source: str | os.PathLike[str]) -> str:
    """The checkpoint format of a model's folder, so that it is written as it came; "gptq" where none is named."""
    config = Path(source) / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return str((content.get("quantization_config") or {}).get("checkpoint_format", "gptq"))


def check_target(folder: Path) -> None:
    """Raise QzoError unless a checkpoint may be written to `folder`."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise QzoError(f"{folder} exists and is not an empty folder; choose another, or remove it")


def _config(model: nn.Module, checkpoint_format: str) -> dict[str, Any]:
    """The model's config.json with a `quantization_config`."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not layers:
        raise QzoError(f"{type(model).__name__} has no QuantLinear layer; call qzo.quantize(model) first")
    if any(isinstance(module, QuantEmbedding) for module in model.modules()):
        raise QzoError("the GPTQ layout has no place for quantized embeddings; quantize with embeddings=None")
    n_bits = layers[0].n_bits
    group_size = min((layer.group_size for layer in layers if layer.group_size != layer.in_features), default=-1)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            with named(path):
                _check_alike(layer, n_bits, group_size)
    if not hasattr(model, "config"):
        raise QzoError(f"{type(model).__name__} has no config; a checkpoint needs a transformers model")
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))  # type: ignore[union-attr,operator]
    config["dtype"] = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": n_bits,
        "group_size": group_size,
        "sym": all(bool((layer.zero_points() == 2 ** (n_bits - 1)).all()) for layer in layers),
        "desc_act": any(layer.act_order for layer in layers),
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
    }
    return config


def _check_alike(layer: QuantLinear, n_bits: int, group_size: int) -> None:
    """A checkpoint holds one n_bits and one group size; a layer whose row is one group fits where K divides so."""
    if (layer.n_bits, layer.group_size) != (n_bits, layer.in_features if group_size == -1 else group_size):
        raise QzoError(
            f"n_bits={layer.n_bits}, group_size={layer.group_size}, but another layer has n_bits={n_bits}, "
            f"group_size={group_size}; a GPTQ checkpoint holds one of each"
        )


def _tensors(model: nn.Module, checkpoint_format: str) -> dict[str, Tensor]:
    """Name -> tensor of the file, every storage once."""
    zeros = {}
    if checkpoint_format == "gptq":
        for path, module in model.named_modules():
            if isinstance(module, QuantLinear):
                zeros[f"{path}.qzeros"] = zeros_to_v1(module.qzeros, module.n_bits)
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.numel())
        if key not in seen or not tensor.numel():
            seen.add(key)
            tensors[name] = zeros.get(name, tensor.detach()).contiguous()
    return tensors
