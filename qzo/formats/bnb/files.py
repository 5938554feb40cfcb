"""Checkpoints that transformers wrote with bitsandbytes: read, summed up and written, without either's loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import OTHER, QzoError, advised, named
from qzo.files.folder import Header, headers_in, opened, read_tensors_of, weight_files
from qzo.files.rewrite import Write, rewriting
from qzo.files.settings import Source
from qzo.formats.bnb.layer import QUANT_TYPES, BnbLinear4bit, BnbLinear8bit
from qzo.formats.bnb.nesting import nest, unnest
from qzo.formats.bnb.state import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_MAP,
    QUANT_MAP,
    ROW_FORMAT,
    SCB,
    STATE,
    QuantState,
    check_parts,
    quantized_paths,
    read_states,
)
from qzo.models.parts import Counted, count
from qzo.models.stored import Build, Stored, layer_of

PER_NUMBER = 8  # codes of four bits, the most that a number (fp32) can hold
PARTS = {"weight": "codes", ABSMAX: "scales", SCB: "scales", NESTED_ABSMAX: "scales"}


def find(source: Source) -> BnbCheckpoint | None:
    """The bitsandbytes checkpoint in a folder; None where there is another one."""
    return BnbCheckpoint(source) if source.method == "bitsandbytes" else None


@dataclass(frozen=True)
class BnbCheckpoint(Stored):
    """A folder with such a checkpoint; double quantization is undone: its scales are fp32 [N K / block_size]."""

    source: Source
    format = "bitsandbytes"
    moving = "there are no zero points"

    @cached_property
    def headers(self) -> dict[str, Header]:  # type: ignore[override]
        """Of all tensors. Raises QzoError for files that are damaged or not there."""
        return headers_in(weight_files(self.folder))

    @cached_property
    def states(self) -> dict[str, QuantState]:
        """Path -> quant_state of every 4-bit layer. Raises QzoError."""
        return read_states(self.headers)

    @property
    def about(self) -> dict[str, Any]:  # type: ignore[override]
        """As far as settings and quant_states tell."""
        settings = self.source.settings or {}
        if settings.get("load_in_8bit") is True:
            return {"version": "int8", "n_bits": 8, "group_size": -1}
        version = str(settings.get("bnb_4bit_quant_type"))
        if any(name.endswith(f".{NESTED_ABSMAX}") for name in self.headers):
            version += ", double quantization"
        try:
            sizes = {state.block_size for state in self.states.values()}
        except QzoError:  # told as the reason why it cannot be trained
            sizes = set()
        return {"version": version, "n_bits": 4, "group_size": sizes.pop() if len(sizes) == 1 else None}

    def paths(self) -> Collection[str]:
        """Layers of whose codes there are scales; so what was left alone (`llm_int8_skip_modules`) stays as it is."""
        return quantized_paths(self.headers)

    def builder(self) -> tuple[Build, int]:
        """By quant_states and headers."""
        return partial(_layer, _bits(self.source), self.headers, self.states), PER_NUMBER

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each file, and of each layer once all of its parts are read."""
        parts: dict[str, dict[str, Tensor]] = {path: {} for path in self.paths()}
        whole = Counter(layer_of(name, parts) for name in self.headers)
        for file in dict.fromkeys(header.file for header in self.headers.values()):
            tensors = {}
            for name, tensor in read_tensors_of(file):
                path = layer_of(name, parts)
                if path is None:
                    tensors[name] = tensor
                else:
                    parts[path][name.removeprefix(f"{path}.")] = tensor
            for path in [path for path, own in parts.items() if len(own) == whole[path]]:
                with named(f"{file}: {path}"):
                    buffers = _buffers(parts.pop(path), self.states.get(path))
                tensors |= {f"{path}.{name}": tensor for name, tensor in buffers.items()}
            yield tensors

    def counted(self, left: Collection[str]) -> Counted:
        """Scales count once, whether they take four bytes or, with double quantization, one and a second level's."""
        paths, headers = self.paths(), {name: header for name, header in self.headers.items() if name not in left}

        def part_of(name: str) -> str | None:
            path = layer_of(name, paths)
            return None if path is None else PARTS.get(name.removeprefix(f"{path}."), "tables")

        counts, sizes = count(headers, ("scales", "codes", "tables"), part_of)
        counts["scales"] -= sum(header.numel for name, header in headers.items() if name.endswith(f".{NESTED_ABSMAX}"))
        counts["codes"] = sizes["codes"] * 8 // self.about["n_bits"]
        return counts, sizes

    def write(self, tensors: dict[str, Tensor]) -> Write:
        """Scales become the tensors that the library keeps them in."""
        return rewriting(self.folder, tensors, _stored(self.folder, self.headers, tensors))


@advised(OTHER)
def _bits(source: Source) -> int:
    """4 or 8. Raises QzoError unless one of transformers' two flags is set, and for another table than NF4 and FP4."""
    folder, settings = source.path, source.settings or {}
    n_bits = [bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit") is True]
    if len(n_bits) != 1:
        raise QzoError(f"{folder}: quantization_config must have one of load_in_4bit and load_in_8bit set to true")
    version = str(settings.get("bnb_4bit_quant_type", "fp4"))
    if n_bits == [4] and version not in QUANT_TYPES:
        raise QzoError(f'{folder}: bnb_4bit_quant_type="{version}" is not supported; need nf4 or fp4')
    return n_bits[0]


def _buffers(parts: dict[str, Tensor], state: QuantState | None) -> dict[str, Tensor]:
    """A layer's tensors by their names there. Raises QzoError for scales that are no numbers."""
    scales = parts[SCB if state is None else ABSMAX]
    if state is not None and state.offset is not None:
        scales = unnest(scales, parts[NESTED_ABSMAX], parts[NESTED_MAP], state.offset)
    if not bool(torch.isfinite(scales).all()):
        raise QzoError("its scales are not all finite")
    layout = int(parts.get(ROW_FORMAT, torch.tensor(0)))
    if layout:
        raise QzoError(f"its weight_format is {layout}; only 0, row by row, is known")
    if state is None:
        return {"qweight": parts["weight"], "scales": scales}
    codes = parts["weight"].view(-1).view(torch.uint8).view(-1, 1)
    return {"qweight": codes, "scales": scales, "quant_map": parts[QUANT_MAP]}


def _layer(
    n_bits: int,
    headers: dict[str, Header],
    states: dict[str, QuantState],
    path: str,
    weight: Tensor,
    bias: Tensor | None,
) -> BnbLinear4bit | BnbLinear8bit:
    """An empty layer. Raises QzoError unless the checkpoint has just the tensors of it."""
    state, (rows, columns) = states.get(path), weight.shape
    if (state is None) != (n_bits == 8):
        raise QzoError(f"it is not quantized to {n_bits} bits, as config.json says")
    known = check_parts(path, (rows, columns), headers, state)
    strange = sorted(name for name in headers if layer_of(name, {path}) == path and name not in known)
    if strange:
        raise QzoError(f"{strange[0]} is not one of its tensors")
    rest = bias is not None, weight.dtype, weight.device
    if state is None:
        return BnbLinear8bit.empty(columns, rows, *rest)
    layer = BnbLinear4bit.empty(columns, rows, state.quant_type, state.block_size, *rest)
    layer.nested, layer.weight_dtype = state.offset is not None, getattr(torch, state.dtype)
    return layer


def _stored(source: Path, headers: dict[str, Header], tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name of a scale, as `qzo.scales` has it -> the tensors of the checkpoint that it becomes.

    Plain scales get another name. With double quantization they are quantized again as the library does it, all scales
    of a layer together; where not one of them changed, the layer's tensors stay as they are, to the byte. The 8-bit
    rounding (rms 0.04 to 0.16 % of the scales of tiny random models) may be more than a short training moved them: the
    journal and `qzo.replay` keep that exactly.

    Args:
        source: folder of the checkpoint.
        headers: of all its tensors.
        tensors: name -> tuned tensor; those that are no scales of quantized layers are left out.

    Raises QzoError for a shape that is not that of the checkpoint.
    """
    states = read_states(headers)
    found = {}
    for name, scales in tensors.items():
        path = name.removesuffix(".scales")
        stored = next((f"{path}.{part}" for part in (ABSMAX, SCB) if f"{path}.{part}" in headers), None)
        if path == name or stored is None:
            continue
        if headers[stored].shape != tuple(scales.shape):
            raise QzoError(
                f"{source} has {stored} with shape {headers[stored].shape}, "
                f"the tuned one has shape {tuple(scales.shape)}"
            )
        state = states.get(path)
        with named(f"{source}: {path}"):
            is_nested = state is not None and state.offset is not None
            found[name] = _nested(path, scales, headers, state) if state and is_nested else {stored: scales}
    return found


def _nested(path: str, scales: Tensor, headers: dict[str, Header], state: QuantState) -> dict[str, Tensor]:
    codes, absmax, quant_map = (_read(f"{path}.{part}", headers) for part in (ABSMAX, NESTED_ABSMAX, NESTED_MAP))
    assert state.offset is not None
    scales = scales.detach().to("cpu", torch.float32)
    if torch.equal(unnest(codes, absmax, quant_map, state.offset), scales):
        return {}
    codes, absmax, offset = nest(scales, quant_map)
    text = replace(state, offset=offset).to_tensor()
    return {
        f"{path}.{ABSMAX}": codes,
        f"{path}.{NESTED_ABSMAX}": absmax,
        f"{path}.{STATE}{state.quant_type}": text,
    }


def _read(name: str, headers: dict[str, Header]) -> Tensor:
    if name not in headers:
        raise QzoError(f"{name} is missing")
    with opened(headers[name].file) as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor
