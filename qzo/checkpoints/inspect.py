"""What a checkpoint holds, and whether QZO can train it, from its configuration and headers: no tensor is read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from qzo.errors import QzoError
from qzo.formats.bnb.files import bnb_facts, bnb_parts, empty_bnb
from qzo.formats.bnb.state import quantized_paths
from qzo.formats.gguf.codes import BLOCK_TYPES, PLAIN_TYPES
from qzo.formats.gguf.header import GgufHeader, read_gguf_header
from qzo.formats.gguf.source import check_packed
from qzo.formats.hqq.files import find_hqq
from qzo.formats.packed import CODES, empty_model
from qzo.formats.torchao.files import find_torchao
from qzo.models.folder import Header, headers_in, read_json, weight_files
from qzo.models.inspection import Inspection
from qzo.models.settings import METHODS, either, method_of, settings_of, understood
from qzo.models.skeleton import FLOATING, IMPLIED, check_architecture, check_counts, dtype_of, skeleton

PARTS = {"scales": "scales", "qweight": "codes", "qzeros": "zero_points", "g_idx": "g_idx"}
PARTS |= {"codes": "codes", "codebooks": "codebooks"}


def inspect(source: str | os.PathLike[str]) -> Inspection:
    """Look at a folder with config.json, or a .gguf file.

    GPTQ, AWQ, AQLM and bitsandbytes: the model is built without data, and every header compared with it, so that
    `reason` is None just where `qzo.load` needs no more than sound data. Other quantizers: what the configuration says.
    Raises QzoError for what is neither, and for files that cannot be read.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return _inspect_gguf(path)
    if not path.is_dir():
        raise QzoError(f"{source} is not a folder; give a folder with config.json, or a .gguf file")
    config = read_json(path / "config.json")
    settings = settings_of(path, config)
    try:
        stored = find_hqq(path, settings) or find_torchao(path, settings)
    except QzoError as error:
        if settings is None:
            raise
        reason = str(error).removeprefix(f"{path}: ")
        return Inspection(str(source), method_of(settings), settings=settings, reason=reason)
    if stored is not None:
        from qzo.checkpoints.inspect_stored import inspect_stored

        return inspect_stored(str(source), stored, config, settings or {})
    if settings is None:
        headers = headers_in(weight_files(path))
        counts, sizes = _parts(headers)
        reason = _obstacle(path, config, headers) or f"it is not quantized; first run: qzo quantize {source} OUT"
        return Inspection(str(source), "unquantized", counts=counts, sizes=sizes, reason=reason)
    method = method_of(settings)
    if method == "bitsandbytes":
        return _inspect_bnb(str(source), path, config, settings)
    if method in METHODS:
        return _inspect_packed(str(source), path, config, settings)
    return Inspection(str(source), method, settings=settings, reason=f"the format {method} is not trainable here yet")


def _inspect_packed(source: str, path: Path, config: dict[str, Any], settings: dict[str, Any]) -> Inspection:
    headers = headers_in(weight_files(path))
    version = either(settings, "checkpoint_format", "format", "version")
    n_bits, group_size = either(settings, "bits", "w_bit"), either(settings, "group_size", "q_group_size")
    if method_of(settings) == "aqlm":
        version = "x".join(str(settings.get(name)) for name in ("num_codebooks", "nbits_per_codebook"))
        n_bits, group_size = settings.get("nbits_per_codebook"), settings.get("in_group_size")
    reason = _obstacle(path, config, headers, settings)
    counts, sizes = _parts(headers)
    if reason is None and method_of(settings) != "aqlm":  # then n_bits is a number that there is a layout for
        counts |= {part: counts[part] * 32 // int(n_bits) for part in ("codes", "zero_points")}
    scales, unquantized = counts["scales"], counts["unquantized"]
    own = "scales+codebooks" if method_of(settings) == "aqlm" else "scales+offsets"
    return Inspection(
        source,
        method_of(settings),
        None if version is None else str(version),
        n_bits,
        group_size,
        settings,
        sum(name.endswith(f".{CODES[method_of(settings)]}") for name in headers),
        counts,
        sizes,
        {"scales": scales, own: scales + counts["codebooks"], "scales+unquantized": scales + unquantized},
        reason,
    )


def _inspect_bnb(source: str, path: Path, config: dict[str, Any], settings: dict[str, Any]) -> Inspection:
    headers = headers_in(weight_files(path))
    facts = bnb_facts(settings, headers)
    counts, sizes = bnb_parts(headers, facts["n_bits"])
    scales, unquantized = counts["scales"], counts["unquantized"]
    return Inspection(
        source,
        "bitsandbytes",
        **facts,
        settings=settings,
        layers=len(quantized_paths(headers)),
        counts=counts,
        sizes=sizes,
        trainable={"scales": scales, "scales+offsets": scales, "scales+unquantized": scales + unquantized},
        reason=_obstacle(path, config, headers, settings),
    )


def _obstacle(
    path: Path, config: dict[str, Any], headers: dict[str, Header], settings: dict[str, Any] | None = None
) -> str | None:
    """Why a model cannot be built of these files; None where nothing but the data could still speak against it."""
    try:
        quantization = None if settings is None else understood(path, settings)
        check_counts(path, config, len(headers))
        check_architecture(path, config)
        if quantization is None:
            skeleton(path, headers, dtype_of(config))
        else:
            ending = CODES.get(quantization.method)
            if not any(name.endswith(f".{ending}") for name in headers) and not quantized_paths(headers):
                raise QzoError(f"no tensor holds codes, and config.json says {quantization.method}")
            build = empty_bnb if quantization.method == "bitsandbytes" else empty_model
            build(path, quantization, headers, dtype_of(config))
    except QzoError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _parts(headers: dict[str, Header]) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers (words, where they are packed) and bytes of each part; of "unquantized" only floating numbers count."""
    counts = dict.fromkeys((*PARTS.values(), "unquantized"), 0)
    sizes = dict.fromkeys(counts, 0)
    packed = {name.rpartition(".")[0] for name in headers if name.endswith((".qweight", ".codes"))}
    for name, header in headers.items():
        path, _, last = name.rpartition(".")
        part = PARTS.get(last, "unquantized") if path in packed else "unquantized"
        sizes[part] += header.nbytes
        if part != "unquantized" or (header.dtype in FLOATING and not name.endswith(IMPLIED)):
            counts[part] += header.numel
    return counts, sizes


def _inspect_gguf(path: Path) -> Inspection:
    """By the header; scales and minima are taken out of the blocks that hold them, those of K-quants are not."""
    header = read_gguf_header(path)
    counts = dict.fromkeys(("scales", "offsets", "codes", "unquantized"), 0)
    sizes, kinds = dict.fromkeys(counts, 0), set()
    for info in header.tensors.values():
        kind, numbers = BLOCK_TYPES.get(info.kind), math.prod(info.shape)
        part = "unquantized" if info.kind in PLAIN_TYPES else "codes"
        counts[part] += numbers
        sizes[part] += info.n_bytes
        kinds |= set() if part == "unquantized" else {GGMLQuantizationType(info.kind).name}
        for name, has in (("scales", kind and kind.has_scale), ("offsets", kind and kind.has_offset)):
            if kind is not None and has:
                counts[name] += numbers // kind.n_weights
                sizes[name] += numbers // kind.n_weights * torch.float16.itemsize
                sizes["codes"] -= numbers // kind.n_weights * torch.float16.itemsize
    return Inspection(
        str(path),
        "gguf",
        ", ".join(sorted(kinds)) or None,
        group_size=next((kind.n_weights for kind in BLOCK_TYPES.values() if kind.has_scale), None) if kinds else None,
        settings={"architecture": header.metadata.get("general.architecture")},
        layers=sum(info.kind not in PLAIN_TYPES for info in header.tensors.values()),
        counts=counts,
        sizes=sizes,
        trainable={
            "scales": counts["scales"],
            "scales+offsets": counts["scales"] + counts["offsets"],
            "scales+unquantized": counts["scales"] + counts["unquantized"],
        },
        reason=_obstacle_in_gguf(path, header, counts["scales"]),
    )


def _obstacle_in_gguf(path: Path, header: GgufHeader, scales: int) -> str | None:
    """Why a .gguf file cannot be trained packed; None where nothing but the data could still speak against it."""
    unknown = sorted({info.kind for info in header.tensors.values()} - set(BLOCK_TYPES) - set(PLAIN_TYPES))
    if unknown:
        return f"it has tensors of the type {GGMLQuantizationType(unknown[0]).name}, which is not known here"
    if not scales:
        return "no tensor has scales that are not quantized themselves; take a Q4_0, Q4_1 or Q8_0 file"
    try:
        check_packed(path, header)
    except QzoError as error:
        return str(error).removeprefix(f"{path}: ")
    return None
