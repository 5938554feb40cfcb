"""New checkpoints of quantized models, in the layouts that have no library behind them, with safetensors alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qzo.durable import check_target
from qzo.errors import QzoError
from qzo.formats.layer import Quantized
from qzo.formats.table import SAVERS, Saver, find
from qzo.formats.vocabulary import QuantEmbedding
from qzo.models.folder import WEIGHTS
from qzo.models.settings import FORMATS, QUANTIZE_CONFIG, source_of
from qzo.quiet import quiet_libraries

BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json", "*.jinja")


def save(model: nn.Module, folder: str | os.PathLike[str], checkpoint_format: str | None = None) -> None:
    """Write `config.json`, `quantize_config.json` (GPTQ) and `model.safetensors` of a quantized model.

    The files are written to a folder beside `folder`, which is renamed when they are complete. Tokenizer and
    generation config are not written. Tensors that share memory are written once, under their first name. The
    experts of mixture models have names of this package's own, which other GPTQ readers do not know.

    Args:
        model: a transformers model with QuantLinear layers, or with AwqLinear layers, all of one `n_bits` and
            `group_size`, or with AqlmLinear layers of one layout.
        folder: must not exist, or be empty.
        checkpoint_format: of QuantLinear layers; "gptq" stores zero points minus 1 (what most readers expect),
            "gptq_v2" as they are. AwqLinear layers have one format, "awq", and AqlmLinear layers "aqlm". None takes
            "gptq", "awq" or "aqlm", whichever fits.

    Extra memory: one copy of the packed zero points.

    Raises:
        QzoError: a folder with something in it, a model that the layout cannot hold.
    """
    target = Path(folder)
    if checkpoint_format is not None and not any(checkpoint_format in saver.NAMES for saver in SAVERS):
        raise QzoError(f'checkpoint_format="{checkpoint_format}" is not known; choose "gptq" or "gptq_v2"')
    check_target(target)
    saver, layers = _layers(model, checkpoint_format)
    checkpoint_format = checkpoint_format or saver.NAMES[0]
    config = _config(model, saver.settings(model, layers, checkpoint_format))
    tensors = _tensors(model, saver.stored(layers, checkpoint_format))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.part"
    partial.mkdir()
    try:
        from safetensors.torch import save_file

        contents = {"config.json": config}
        if checkpoint_format in FORMATS:
            contents[QUANTIZE_CONFIG] = config["quantization_config"]
        for name, content in contents.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod((partial / "config.json").stat().st_mode)  # safetensors makes it private
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def format_of(source: str | os.PathLike[str]) -> str | None:
    """The checkpoint format of a model's folder, so that it is written as it came; None, for `save`, of another one."""
    path = Path(source)
    found = find(source_of(path)) if (path / "config.json").is_file() else None
    return None if found is None else found.saved_as


def _layers(model: nn.Module, checkpoint_format: str | None) -> tuple[Saver, dict[str, Any]]:
    """Who writes a model, and path -> layer with codes. Raises QzoError where one has no place in the layout."""
    known = tuple(saver.LAYER for saver in SAVERS)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, known)}
    if not layers:
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
        raise QzoError(f"{type(model).__name__} has no config; a checkpoint needs a transformers model")
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))  # type: ignore[union-attr,operator]
    config["dtype"] = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
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


def _copy_beside(source: Path, target: Path) -> None:
    """Copy tokenizer and generation config as they are, or, where the model is no folder, write the tokenizer alone."""
    for pattern in BESIDE_WEIGHTS if source.is_dir() else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if not source.is_dir():
        from qzo.checkpoints.load import load_tokenizer

        try:
            tokenizer = load_tokenizer(source)
            with quiet_libraries():
                tokenizer.save_pretrained(target)
        except QzoError as error:
            print(f"note: {error}; {target} is written without one", file=sys.stderr)
