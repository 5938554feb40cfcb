"""What a checkpoint's configuration says of its codes: which layout, how many bits, which groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qzo.errors import QzoError, named
from qzo.formats.aqlm.layer import AqlmLayout
from qzo.models.folder import read_json

FORMATS = ("gptq", "gptq_v2")
QUANTIZE_CONFIG = "quantize_config.json"  # where AutoGPTQ and gptqmodel look first
AWQ_CONFIG = "quant_config.json"  # the same of AutoAWQ
METHODS = ("gptq", "awq", "aqlm", "bitsandbytes")


@dataclass(frozen=True)
class Quantization:
    """The layout of a checkpoint that can be trained.

    Args:
        method: "gptq", "awq", "aqlm" or "bitsandbytes".
        n_bits: of a code.
        group_size: weights along K that share a scale, -1 for the whole row; in AQLM those that share a code; of
            bitsandbytes, what is usual: each layer has a block size of its own.
        version: "gptq" (zero points are stored minus 1) or "gptq_v2"; "gemm" for AWQ; "1x16" or the like for AQLM;
            "nf4", "fp4" or "int8".
        aqlm: all sizes of an AQLM layout.
    """

    method: str
    n_bits: int
    group_size: int
    version: str
    aqlm: AqlmLayout | None = None


def settings_of(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of a checkpoint's quantizer, from config.json or a file beside it; None for an unquantized one.

    Raises QzoError for settings that are no JSON object.
    """
    settings = config.get("quantization_config")
    for name, method in ((QUANTIZE_CONFIG, "gptq"), (AWQ_CONFIG, "awq")):  # all that was written at first
        if settings is None and (folder / name).is_file():
            settings = {"quant_method": method, **read_json(folder / name)}
    if settings is not None and not isinstance(settings, dict):
        raise QzoError(f"{folder}: quantization_config in config.json is not a JSON object")
    return settings


def method_of(settings: dict[str, Any]) -> str:
    """The quantizer's name; "None" where there is none."""
    return str(either(settings, "quant_method", "method"))


def understood(folder: Path, settings: dict[str, Any]) -> Quantization:
    """The layout that the settings name. Raises QzoError for one that is not supported, and for what is no number."""
    method = method_of(settings)
    if method not in METHODS:
        raise QzoError(
            f'{folder}: quant_method="{method}" is not supported; give a checkpoint of GPTQ, AWQ, AQLM or '
            "bitsandbytes, or an unquantized one"
        )
    if method == "bitsandbytes":
        return _bitsandbytes(folder, settings)
    if method == "aqlm":
        with named(str(folder)):
            names = [field.name for field in fields(AqlmLayout) if field.name in settings]
            sizes = AqlmLayout(**{name: settings[name] for name in names})
        return Quantization(method, sizes.nbits_per_codebook, sizes.in_group_size, sizes.name, sizes)
    n_bits, group_size = (
        _whole_number(folder, settings, *names) for names in (("bits", "w_bit"), ("group_size", "q_group_size"))
    )
    if method == "gptq":
        version = str(either(settings, "checkpoint_format", "format") or "gptq")
        if version not in FORMATS:
            raise QzoError(f'{folder}: checkpoint_format="{version}" is not supported; need gptq or gptq_v2')
        return Quantization(method, n_bits, group_size, version)
    version = str(either(settings, "version") or "gemm").lower()
    if version != "gemm":
        raise QzoError(f'{folder}: AWQ version="{version}" is not supported; need gemm, AutoAWQ\'s default')
    if n_bits != 4:
        raise QzoError(f"{folder}: AWQ with bits={n_bits} is not supported; need 4")
    if settings.get("zero_point") is False:
        raise QzoError(f"{folder}: AWQ with zero_point=false is not supported; need true, AutoAWQ's default")
    return Quantization(method, n_bits, group_size, version)


def _bitsandbytes(folder: Path, settings: dict[str, Any]) -> Quantization:
    """Transformers' settings of bitsandbytes: one of two flags is set."""
    n_bits = [bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit") is True]
    if len(n_bits) != 1:
        raise QzoError(f"{folder}: quantization_config must have one of load_in_4bit and load_in_8bit set to true")
    if n_bits == [8]:
        return Quantization("bitsandbytes", 8, -1, "int8")
    version = str(settings.get("bnb_4bit_quant_type", "fp4"))
    if version not in ("nf4", "fp4"):
        raise QzoError(f'{folder}: bnb_4bit_quant_type="{version}" is not supported; need nf4 or fp4')
    return Quantization("bitsandbytes", 4, 64, version)


def either(settings: dict[str, Any], *names: str) -> Any:
    """The value of the first of these names that is there: readers and writers disagree on what to call it."""
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _whole_number(folder: Path, settings: dict[str, Any], *names: str) -> int:
    value = either(settings, *names)
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise QzoError(f"{folder}: quantization_config must have whole numbers bits and group_size") from error
    return number
