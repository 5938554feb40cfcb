"""What a checkpoint's configuration says of its quantizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzo.errors import QzoError, advised
from qzo.files.bounds import check_folder
from qzo.files.folder import read_json

FORMATS = ("gptq", "gptq_v2")
QUANTIZE_CONFIG = "quantize_config.json"  # where AutoGPTQ and gptqmodel look first
AUTOROUND = ("auto-round", "auto_round", "intel/auto-round")
AUTOROUND_PACKINGS = {f"auto_round:{prefix}{name}": name for prefix in ("", "auto_") for name in ("gptq", "awq")}
AWQ_CONFIG = "quant_config.json"  # the same of AutoAWQ
TUNED = ("run.json", "trained.safetensors")  # of a run, and of a checkpoint of QZOTrainer
ADAPTER_CONFIG, ADAPTERS = "adapter_config.json", "adapter_model."  # of peft


@dataclass(frozen=True)
class Source:
    """What a model is read from.

    Args:
        path: a folder with config.json, or a .gguf file.
        config: what config.json says; empty for a file.
        settings: what it, or a file beside it, says of the quantizer; None where nothing does.
    """

    path: Path
    config: dict[str, Any]
    settings: dict[str, Any] | None

    @property
    def method(self) -> str | None:
        """The quantizer's name; None where none is named."""
        return None if self.settings is None else method_of(self.settings)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a GGUF file by its name, however its suffix is written."""
    return Path(path).suffix.lower() == ".gguf"


def source_of(path: Path) -> Source:
    """What lies at a path. Raises QzoError for a folder without a config.json that can be read.

    Nothing in the folder may be what a reader would wait for or fill its memory with (see `bounds.py`).
    """
    if is_gguf(path):
        return Source(path, {}, None)
    check_folder(path)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists():
        raise QzoError(
            f"{path} holds adapters without their model; load the model they are for, and put them on it with peft "
            "(PeftModel.from_pretrained)"
        )
    check_no_run(path)
    with advised("give a folder with a whole config.json, a .gguf file or a hub id"):
        config = read_json(path / "config.json")
    return Source(path, config, settings_of(path, config))


def check_no_run(folder: Path) -> None:
    """Raise QzoError for the folder of a run, or a checkpoint of QZOTrainer, where the files of a model are needed."""
    if any((folder / name).is_file() for name in TUNED) and not (folder / "config.json").is_file():
        raise QzoError(
            f"{folder} holds tuned tensors without their model; give that model, or what qzo export {folder} OUT writes"
        )


def settings_of(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of a checkpoint's quantizer, from config.json or a file beside it; None for an unquantized one.

    Raises QzoError for settings that are no JSON object.
    """
    settings = config.get("quantization_config")
    for name, method in ((QUANTIZE_CONFIG, "gptq"), (AWQ_CONFIG, "awq")):  # all that was written at first
        if settings is None and (folder / name).is_file():
            settings = {"quant_method": method, **read_json(folder / name)}
    if settings is not None and not isinstance(settings, dict):
        raise QzoError(f"{folder}: quantization_config in config.json is not a JSON object; mend config.json")
    return settings


def check_no_adapters(source: Source) -> None:
    """Raise QzoError for adapters beside a model, which one way of loading would add to it and another leave out.

    What is left of them beside a quantized model, settings without weights, is nobody's to read.
    """
    weights = sorted(file.name for file in source.path.glob(f"{ADAPTERS}*") if file.is_file())
    if (source.path / ADAPTER_CONFIG).is_file() and (weights or source.settings is None):
        raise QzoError(
            f"{source.path} has {ADAPTER_CONFIG} beside a model, and adapters are not read; merge them with peft "
            f"(merge_and_unload), or move {' and '.join([ADAPTER_CONFIG, *weights])} away to have the model without"
        )


def method_of(settings: dict[str, Any]) -> str:
    """The quantizer's name; "None" where there is none. Of AutoRound that of the layout which its tensors have."""
    name = str(either(settings, "quant_method", "method"))
    packing = str(settings.get("packing_format") or "auto_round:auto_gptq")
    return AUTOROUND_PACKINGS.get(packing, f"{name} ({packing})") if name in AUTOROUND else name


def either(settings: dict[str, Any], *names: str) -> Any:
    """The value of the first of these names that is there: readers and writers disagree on what to call it."""
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def whole_number(folder: Path, settings: dict[str, Any], *names: str) -> int:
    """The whole number under the first of these names that is there. Raises QzoError for what is none."""
    value = either(settings, *names)
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise QzoError(
            f"{folder}: quantization_config must have whole numbers bits and group_size; mend config.json"
        ) from error
    return number
