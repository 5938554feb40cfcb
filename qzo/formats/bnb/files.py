"""Checkpoints that transformers wrote with bitsandbytes: read, summed up and written, without either's loader."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qzo.errors import QzoError, named
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
from qzo.models.folder import Header, headers_in, opened, read_tensors_of, weight_files
from qzo.models.inspection import Inspection, obstacle
from qzo.models.rewrite import Write, rewriting
from qzo.models.settings import Source
from qzo.models.skeleton import (
    FLOATING,
    IMPLIED,
    check_architecture,
    check_counts,
    check_tensors,
    dtype_of,
    finish,
    skeleton,
)
from qzo.models.walk import freeze, is_conv1d, put, weight_of

PER_NUMBER = 8  # codes of four bits, the most that a number (fp32) can hold


def find(source: Source) -> BnbCheckpoint | None:
    """The bitsandbytes checkpoint in a folder; None where there is another one."""
    return BnbCheckpoint(source) if source.method == "bitsandbytes" else None


@dataclass(frozen=True)
class BnbCheckpoint:
    """A folder with such a checkpoint."""

    source: Source
    saved_as: ClassVar[str | None] = None

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.source.path

    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """Build the model on meta, put quantized layers in, and give every tensor its value file by file.

        Double quantization is undone: the scales become fp32 [N K / block_size]. Extra memory: the tensors of one file,
        until they are in place. Raises QzoError for files that are damaged or do not belong together.
        """
        headers = headers_in(weight_files(self.folder))
        dtype = dtype or dtype_of(self.source.config)
        model, states = self._empty(headers, dtype)
        parts: dict[str, dict[str, Tensor]] = {path: {} for path in states}
        for file in dict.fromkeys(header.file for header in headers.values()):
            plain = {}
            for name, tensor in read_tensors_of(file, str(device)):
                path = layer_of(name, states)
                if path is not None:
                    parts[path][name.removeprefix(f"{path}.")] = tensor
                elif not name.endswith(IMPLIED):
                    plain[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            model.load_state_dict(plain, strict=False, assign=True)
            for path in [path for path, own in parts.items() if _is_whole(own, states[path])]:
                with named(f"{file}: {path}"):
                    _fill(model.get_submodule(path), parts.pop(path), states[path])
        finish(model, device)
        return freeze(model).eval()

    def inspect(self, name: str) -> Inspection:
        """What headers, settings and quant_states tell; `reason` is None where loading needs but sound data."""
        headers = headers_in(weight_files(self.folder))
        settings = self.source.settings or {}
        facts = _facts(settings, headers)
        counts, sizes = _parts(headers, facts["n_bits"])
        scales, unquantized = counts["scales"], counts["unquantized"]
        return Inspection(
            name,
            "bitsandbytes",
            **facts,
            settings=settings,
            layers=len(quantized_paths(headers)),
            counts=counts,
            sizes=sizes,
            trainable={"scales": scales, "scales+offsets": scales, "scales+unquantized": scales + unquantized},
            reason=obstacle(self.folder, lambda: self._empty(headers, dtype_of(self.source.config))),
            moving="there are no zero points",
        )

    def writing(self, tensors: dict[str, Tensor]) -> Write:
        """Scales become the tensors that the library keeps them in."""
        stored = _stored(self.folder, headers_in(weight_files(self.folder)), tensors)
        return rewriting(self.folder, tensors, stored)

    def _empty(self, headers: dict[str, Header], dtype: torch.dtype) -> tuple[Any, dict[str, QuantState | None]]:
        """The model on meta with quantized layers, and path -> quant_state (None of int8) of each.

        All headers are then known to be those of its tensors. Raises QzoError.
        """
        folder, n_bits = self.folder, _bits(self.source)
        check_counts(folder, self.source.config, len(headers))
        check_architecture(folder, self.source.config)
        if not quantized_paths(headers):
            raise QzoError(f"{folder}: no tensor holds codes, and config.json says bitsandbytes")
        model = skeleton(folder, headers, dtype, PER_NUMBER)
        states = _insert_layers(folder, model, headers, n_bits)
        plain = {name: header for name, header in headers.items() if layer_of(name, states) is None}
        checked = {f"{path}.{name}" for path in states for name, _ in model.get_submodule(path).named_buffers()}
        check_tensors(folder, model, plain, checked)
        return model, states


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


def layer_of(name: str, paths: Container[str]) -> str | None:
    """The quantized layer that a tensor of a file belongs to; None for a bias, and for what is of no such layer."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return None if name == f"{path}.bias" else path
    return None


def _is_whole(parts: dict[str, Tensor], state: QuantState | None) -> bool:
    needed = {"weight", SCB} if state is None else {"weight", ABSMAX, QUANT_MAP}
    if state is not None and state.offset is not None:
        needed |= {NESTED_ABSMAX, NESTED_MAP}
    return needed <= parts.keys()


def _fill(layer: Any, parts: dict[str, Tensor], state: QuantState | None) -> None:
    """Give a layer its tensors. Raises QzoError for scales that are no numbers."""
    scales = parts[SCB if state is None else ABSMAX]
    if state is not None and state.offset is not None:
        scales = unnest(scales, parts[NESTED_ABSMAX], parts[NESTED_MAP], state.offset)
    if not bool(torch.isfinite(scales).all()):
        raise QzoError("its scales are not all finite")
    layout = int(parts.get(ROW_FORMAT, torch.tensor(0)))
    if layout:
        raise QzoError(f"its weight_format is {layout}; only 0, row by row, is known")
    if state is None:
        layer.qweight, layer.scales = parts["weight"], scales
    else:
        layer.assign(parts["weight"].view(-1).view(torch.uint8).view(-1, 1), scales, parts[QUANT_MAP], layer.bias)


def _insert_layers(
    folder: Path, model: nn.Module, headers: dict[str, Header], n_bits: int
) -> dict[str, QuantState | None]:
    """A quantized layer for each one whose codes are in the checkpoint; all else stays as it is.

    So what bitsandbytes was told to leave alone (`llm_int8_skip_modules`) does. Raises QzoError for other tensors.
    """
    paths, states = quantized_paths(headers), read_states(headers)
    found: dict[str, QuantState | None] = {}
    for path, module in list(model.named_modules()):
        if path not in paths | states.keys():
            continue
        found[path] = states.get(path)
        with named(f"{folder}: {path}"):
            if not (isinstance(module, nn.Linear) or is_conv1d(module)):
                raise QzoError(f"it is quantized, and a {type(module).__name__} cannot be")
            if (found[path] is None) != (n_bits == 8):
                raise QzoError(f"it is not quantized to {n_bits} bits, as config.json says")
            layer = _layer(path, weight_of(module), module.bias, headers, found[path])
        put(model, (path,), layer)
    unknown = sorted((paths | states.keys()) - found.keys())
    if unknown:
        raise QzoError(f"{folder}: the model has no layer {unknown[0]}; config.json and weights do not belong together")
    return found


def _layer(
    path: str, weight: Tensor, bias: Tensor | None, headers: dict[str, Header], state: QuantState | None
) -> nn.Module:
    """An empty layer. Raises QzoError unless the checkpoint has just the tensors of it."""
    rows, columns = weight.shape
    known = check_parts(path, (rows, columns), headers, state)
    strange = sorted(name for name in headers if layer_of(name, {path}) == path and name not in known)
    if strange:
        raise QzoError(f"{strange[0]} is not one of its tensors")
    has_bias = bias is not None or f"{path}.bias" in headers
    if state is None:
        return BnbLinear8bit.empty(columns, rows, has_bias, weight.dtype, weight.device)
    kind, size = state.quant_type, state.block_size
    layer = BnbLinear4bit.empty(columns, rows, kind, size, has_bias, weight.dtype, weight.device)
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


PARTS = {"weight": "codes", ABSMAX: "scales", SCB: "scales", NESTED_ABSMAX: "scales"}


def _parts(headers: dict[str, Header], n_bits: int) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers and bytes of "scales", "codes", "tables" and "unquantized", of which only floating numbers count.

    Scales count once, whether they take four bytes or, with double quantization, one and a share of the second level.
    """
    counts = dict.fromkeys(("scales", "codes", "tables", "unquantized"), 0)
    sizes, paths = dict.fromkeys(counts, 0), quantized_paths(headers)
    for name, header in headers.items():
        path = layer_of(name, paths)
        part = "unquantized" if path is None else PARTS.get(name.removeprefix(f"{path}."), "tables")
        sizes[part] += header.nbytes
        if part == "codes":
            counts[part] += header.nbytes * 8 // n_bits
        elif not name.endswith(NESTED_ABSMAX) and (
            part != "unquantized" or (header.dtype in FLOATING and not name.endswith(IMPLIED))
        ):
            counts[part] += header.numel
    return counts, sizes


def _facts(settings: dict[str, Any], headers: dict[str, Header]) -> dict[str, Any]:
    """`version`, `n_bits` and `group_size` of an Inspection, as far as settings and quant_states tell."""
    if settings.get("load_in_8bit") is True:
        return {"version": "int8", "n_bits": 8, "group_size": -1}
    version = str(settings.get("bnb_4bit_quant_type"))
    if any(name.endswith(f".{NESTED_ABSMAX}") for name in headers):
        version += ", double quantization"
    try:
        sizes = {state.block_size for state in read_states(headers).values()}
    except QzoError:  # told as the reason why it cannot be trained
        sizes = set()
    return {"version": version, "n_bits": 4, "group_size": sizes.pop() if len(sizes) == 1 else None}
