"""Checkpoints in the layouts of GPTQ, AWQ and AQLM, written and read with safetensors alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qzo.durable import check_target
from qzo.errors import QzoError, named
from qzo.formats.aqlm.layer import AqlmLinear
from qzo.formats.awq.layer import AwqLinear
from qzo.formats.gptq.codes import zeros_to_v1
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.vocabulary import QuantEmbedding
from qzo.models.folder import WEIGHTS, read_json
from qzo.models.settings import FORMATS, QUANTIZE_CONFIG, either, method_of, settings_of
from qzo.models.walk import output_head

AWQ, AQLM = "awq", "aqlm"
Packed = QuantLinear | AwqLinear | AqlmLinear
KINDS: dict[str, type[Packed]] = {**dict.fromkeys(FORMATS, QuantLinear), AWQ: AwqLinear, AQLM: AqlmLinear}


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
    if checkpoint_format not in (*KINDS, None):
        raise QzoError(f'checkpoint_format="{checkpoint_format}" is not known; choose "gptq" or "gptq_v2"')
    check_target(target)
    layers = _layers(model)
    first = next(iter(layers.values()))
    checkpoint_format = checkpoint_format or next(name for name, kind in KINDS.items() if isinstance(first, kind))
    _check_kinds(layers, checkpoint_format)
    config = _config(model, layers, checkpoint_format)
    tensors = _tensors(model, checkpoint_format)
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
    config = Path(source) / "config.json"
    settings = settings_of(Path(source), read_json(config)) if config.is_file() else None
    if settings is None:
        return None
    method = method_of(settings)
    return method if method in (AWQ, AQLM) else str(either(settings, "checkpoint_format", "format") or "gptq")


def _layers(model: nn.Module) -> dict[str, Packed]:
    """Path -> layer with codes. Raises QzoError where there is none, and for a quantized embedding."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Packed)}
    if not layers:
        raise QzoError(f"{type(model).__name__} has no QuantLinear layer; call qzo.quantize(model) first")
    if any(isinstance(module, QuantEmbedding) for module in model.modules()):
        raise QzoError("the GPTQ layout has no place for quantized embeddings; quantize with embeddings=None")
    return layers


def _check_kinds(layers: dict[str, Packed], checkpoint_format: str) -> None:
    kind = KINDS[checkpoint_format]
    for path, layer in layers.items():
        if not isinstance(layer, kind):
            raise QzoError(
                f'{path}: a {type(layer).__name__} cannot be written with checkpoint_format="{checkpoint_format}"; '
                "write the model in the format it came in"
            )


def _config(model: nn.Module, layers: dict[str, Packed], checkpoint_format: str) -> dict[str, Any]:
    """The model's config.json with a `quantization_config`."""
    is_aqlm = checkpoint_format == AQLM
    settings = _aqlm_settings(model, layers) if is_aqlm else _settings(model, layers, checkpoint_format)
    if not hasattr(model, "config"):
        raise QzoError(f"{type(model).__name__} has no config; a checkpoint needs a transformers model")
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))  # type: ignore[union-attr,operator]
    config["dtype"] = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    config["quantization_config"] = settings
    return config


def _settings(model: nn.Module, layers: dict[str, Any], checkpoint_format: str) -> dict[str, Any]:
    all_layers = list(layers.values())
    n_bits = all_layers[0].n_bits
    group_size = min((layer.group_size for layer in all_layers if layer.group_size != layer.in_features), default=-1)
    for path, layer in layers.items():
        with named(path):
            _check_alike(layer, n_bits, group_size)
    method = AWQ if checkpoint_format == AWQ else "gptq"
    own = _awq_settings(model) if method == AWQ else _gptq_settings(all_layers, n_bits, checkpoint_format)
    return {"quant_method": method, "bits": n_bits, "group_size": group_size, **own}


def _gptq_settings(layers: list[Any], n_bits: int, checkpoint_format: str) -> dict[str, Any]:
    return {
        "sym": all(bool((layer.zero_points() == 2 ** (n_bits - 1)).all()) for layer in layers),
        "desc_act": any(isinstance(layer, QuantLinear) and layer.act_order for layer in layers),
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
    }


def _aqlm_settings(model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    layout = next(iter(layers.values())).layout
    for path, layer in layers.items():
        if layer.layout != layout:
            raise QzoError(f"{path}: {layer.layout}, but another layer has {layout}; a checkpoint holds one")
    head = [path for path, module in model.named_modules() if module is output_head(model)]
    plain = [*head, *_left_plain(model)]
    both = [*plain, *(f"{path}.weight" for path in plain)]  # transformers 5 looks for layers, 4 for their weights
    return {"quant_method": AQLM, **asdict(layout), "linear_weights_not_to_quantize": both}


def _left_plain(model: nn.Module) -> list[str]:
    """Paths of the linear layers without codes, but for the output head."""
    head = output_head(model)
    return [path for path, module in model.named_modules() if type(module) is nn.Linear and module is not head]


def _awq_settings(model: nn.Module) -> dict[str, Any]:
    plain = _left_plain(model)
    return {"zero_point": True, "version": "gemm", "modules_to_not_convert": plain or None}


def _check_alike(layer: Any, n_bits: int, group_size: int) -> None:
    """A checkpoint holds one n_bits and one group size; a layer whose row is one group fits where K divides so."""
    if (layer.n_bits, layer.group_size) != (n_bits, layer.in_features if group_size == -1 else group_size):
        raise QzoError(
            f"n_bits={layer.n_bits}, group_size={layer.group_size}, but another layer has n_bits={n_bits}, "
            f"group_size={group_size}; a checkpoint holds one of each"
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


BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json", "*.jinja")


def _copy_beside(source: Path, target: Path) -> None:
    """Copy tokenizer and generation config as they are, or, where the model is no folder, write the tokenizer alone."""
    for pattern in BESIDE_WEIGHTS if source.is_dir() else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if not source.is_dir():
        from qzo.checkpoints.load import load_tokenizer

        try:
            load_tokenizer(source).save_pretrained(target)
        except QzoError as error:
            print(f"note: {error}; {target} is written without one", file=sys.stderr)
