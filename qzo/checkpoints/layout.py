"""New checkpoints of quantized models, in the layouts that have no library behind them, with safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.files.folder import WEIGHTS
from qzo.files.rewrite import Write
from qzo.files.settings import FORMATS, QUANTIZE_CONFIG, method_of
from qzo.formats.layer import Quantized
from qzo.formats.table import SAVERS, Saver
from qzo.formats.vocabulary import QuantEmbedding


def new_layout(model: nn.Module, checkpoint_format: str | None, read: dict[str, Any] | None = None) -> Write:
    """What writes `config.json`, `quantize_config.json` (GPTQ) and `model.safetensors` into a folder.

    Tensors that share memory are written once, under their first name. The experts of mixture models have names of this
    package's own, which other GPTQ readers do not know.

    Args:
        model: a transformers model with QuantLinear layers, or with AwqLinear or AqlmLinear layers.
        checkpoint_format: of QuantLinear layers; "gptq" stores zero points minus 1 (what most readers expect),
            "gptq_v2" as they are. AwqLinear layers have one format, "awq", and AqlmLinear layers "aqlm". None takes
            "gptq", "awq" or "aqlm", whichever fits.
        read: settings that the model came with; all of them are written, with another format where it is another.

    Extra memory: one copy of the packed zero points. Raises QzoError for a model that the layout cannot hold.
    """
    if checkpoint_format is not None and not any(checkpoint_format in saver.NAMES for saver in SAVERS):
        raise QzoError(f'checkpoint_format="{checkpoint_format}" is not known; choose "gptq" or "gptq_v2"')
    saver, layers = _layers(model, checkpoint_format)
    read = read if read is not None and method_of(read) in saver.NAMES else None
    name = checkpoint_format or saver.NAMES[0]
    config = _config(model, saver.settings(model, layers, name, read))
    tensors = _tensors(model, saver.stored(layers, name))

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        contents = {"config.json": config}
        if name in FORMATS:
            contents[QUANTIZE_CONFIG] = config["quantization_config"]
        for file, content in contents.items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)  # safetensors makes it private

    return write


def _layers(model: nn.Module, checkpoint_format: str | None) -> tuple[Saver, dict[str, Any]]:
    """Who writes a model, and path -> layer with codes. Raises QzoError where one has no place in the layout."""
    known = tuple(saver.LAYER for saver in SAVERS)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, known)}
    if not layers:
        others = sorted({type(module).__name__ for module in model.modules() if isinstance(module, Quantized)})
        if others:
            raise QzoError(
                f"{others[0]} layers are only written into the checkpoint they came from, and this model came from "
                "none; call qzo.release(model), and save it with the library that made them"
            )
        raise QzoError(f"{type(model).__name__} has no QuantLinear layer; call qzo.quantize(model) first")
    if any(isinstance(module, QuantEmbedding) for module in model.modules()):
        raise QzoError("the GPTQ layout has no place for quantized embeddings; quantize with embeddings=None")
    first: Quantized = next(iter(layers.values()))
    saver = next(
        saver
        for saver in SAVERS
        if (isinstance(first, saver.LAYER) if checkpoint_format is None else checkpoint_format in saver.NAMES)
    )
    for path, layer in layers.items():
        if not isinstance(layer, saver.LAYER):
            raise QzoError(
                f"{path}: a {type(layer).__name__} cannot be written with "
                f'checkpoint_format="{checkpoint_format or saver.NAMES[0]}"; write the model in the format it came in'
            )
    return saver, layers


def _config(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The model's config.json with a `quantization_config`."""
    if not hasattr(model, "config"):
        raise QzoError(f"{type(model).__name__} has no config, which a checkpoint needs; pass a transformers model")
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))  # type: ignore[union-attr,operator]
    config["dtype"] = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = settings
    return config


def _tensors(model: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> tensor of the file, every storage once; `stored` are those that the file has otherwise."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.numel())
        if key not in seen or not tensor.numel():
            seen.add(key)
            tensors[name] = stored.get(name, tensor.detach()).contiguous()
    return tensors
