"""Checkpoints of compressed-tensors, as llm-compressor writes them: safetensors beside a quantization_config.

Of a quantized layer the files have path.weight_packed and path.weight_shape, its N and K, or path.weight in int8;
path.weight_scale; where codes are asymmetric path.weight_zero_point; and with actorder "group" path.weight_g_idx, which
the library wrote until 2026: column k has the scale of group g_idx[k], and every group as many columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qzo.errors import QzoError, named
from qzo.files.folder import Header, headers_in, opened, read_tensors_of, weight_files
from qzo.files.rewrite import Write, rewriting
from qzo.files.settings import Source
from qzo.formats.compressed.layer import BUFFER_OF, CompressedLinear
from qzo.formats.compressed.schemes import Schemes, schemes_of
from qzo.models.inspection import WHOLE_ZEROS
from qzo.models.skeleton import WHOLE
from qzo.models.stored import StoredModel, on_meta

METHOD = "compressed-tensors"
MARKS = ("weight_packed", "weight_scale")  # of a layer with codes
SCALE, SHAPE, ORDER = "weight_scale", "weight_shape", "weight_g_idx"


def find(source: Source) -> StoredModel | None:
    """The checkpoint of compressed-tensors in a folder; None where there is another one.

    Raises QzoError for a damaged one, and for one that quantizes more than weights, or weights in another way.
    """
    if source.method != METHOD:
        return None
    folder = source.path
    with named(f"{folder}: quantization_config"):
        schemes = schemes_of(source.settings or {})
    headers = headers_in(weight_files(folder))
    parts: dict[str, dict[str, Header]] = {path: {} for name in headers if (path := _layer_of(name)) is not None}
    if not parts:
        raise QzoError(f"{folder}: no tensor holds codes, and config.json says {METHOD}")
    for name, header in headers.items():
        path, _, last = name.rpartition(".")
        if path in parts:
            parts[path][last] = header
    shapes = _shapes({f"{path}.{SHAPE}": own[SHAPE] for path, own in parts.items() if SHAPE in own})
    layers = {}
    for path, own in parts.items():
        with named(f"{next(iter(own.values())).file}: {path}"):
            layers[path] = _layer(schemes, path, own, shapes.get(f"{path}.{SHAPE}"))
    reading, writing = partial(_read, headers, layers), partial(_writing, folder, headers)
    return StoredModel(METHOD, source, headers, layers, reading, writing, WHOLE_ZEROS)


def _layer_of(name: str) -> str | None:
    """The path of the layer that a tensor shows to have codes."""
    path, _, last = name.rpartition(".")
    return path if last in MARKS else None


def _shapes(headers: dict[str, Header]) -> dict[str, tuple[int, ...]]:
    """Name -> the two numbers in a tensor that holds a shape; read, since the last word of a row may not be full.

    Raises QzoError for a tensor that holds none.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in dict.fromkeys(header.file for header in headers.values()):
        with opened(file) as tensors:
            for name, header in headers.items():
                if header.file != file:
                    continue
                numbers = tensors.get_tensor(name).tolist() if header.shape == (2,) and header.dtype in WHOLE else []
                if not numbers or not all(0 < number < 2**31 for number in numbers):
                    raise QzoError(f"{file}: {name} does not hold the two sizes of a weight")
                found[name] = tuple(numbers)
    return found


def _layer(schemes: Schemes, path: str, parts: dict[str, Header], shape: tuple[int, ...] | None) -> CompressedLinear:
    """The layer on meta that settings and headers describe. Raises QzoError where they contradict each other."""
    scheme = schemes.of(path)
    tensors = {name: on_meta(f"{path}.{name}", header) for name, header in parts.items()}
    bias = tensors.pop("bias", None)
    if scheme.is_packed:
        if tensors.pop(SHAPE, None) is None or shape is None:
            raise QzoError(f"{SHAPE} is missing")
    else:
        shape = tuple(tensors["weight"].shape) if "weight" in tensors else ()
        if len(shape) != 2:
            raise QzoError("weight is missing, or no matrix")
    if ORDER in tensors and parts[ORDER].dtype in WHOLE:
        tensors[ORDER] = tensors[ORDER].int()
    return CompressedLinear(scheme, (shape[0], shape[1]), tensors, bias)


def _read(headers: dict[str, Header], layers: dict[str, CompressedLinear]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file by their names in the model. Raises QzoError for an order of columns that is none."""
    for file in dict.fromkeys(header.file for header in headers.values()):
        tensors = {}
        for name, tensor in read_tensors_of(file):
            path, _, last = name.rpartition(".")
            if path not in layers:
                tensors[name] = tensor
            elif last == ORDER:
                tensors[f"{path}.g_idx"] = _ordered(tensor, layers[path].group_size, f"{file}: {name}")
            elif last != SHAPE:
                tensors[f"{path}.{BUFFER_OF.get(last, last)}"] = tensor
        yield tensors


def _ordered(g_idx: Tensor, group_size: int, place: str) -> Tensor:
    """The group of each column, int32 [K]; where the library has left -1 they are in order. Raises QzoError."""
    in_order = torch.arange(len(g_idx), dtype=torch.int32) // group_size
    if bool((g_idx == -1).all()):
        return in_order
    if not torch.equal(g_idx.sort().values.int(), in_order):
        raise QzoError(f"{place} does not have each group 0 ... {int(in_order[-1])} for {group_size} columns")
    return g_idx.int()


def _writing(source: Path, headers: dict[str, Header], tensors: dict[str, Tensor]) -> Write:
    """Scales, as `qzo.scales` names them, into their tensors in the files. Raises QzoError for one without a place."""
    found = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        stored = f"{path}.{SCALE}"
        if last != "scales" or stored not in headers:
            continue
        if headers[stored].shape != tuple(tensor.shape):
            raise QzoError(f"{source} has no place for {name} with shape {tuple(tensor.shape)}")
        found[name] = {stored: tensor}
    return rewriting(source, tensors, found)
