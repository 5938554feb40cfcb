"""Checkpoints of HQQ: `qmodel.pt` as the library saves it, and safetensors as it and transformers 4 do.

qmodel.pt      a dictionary path -> {W_q, scale, zero, bias, and settings as Python values}; old ones keep all but
               W_q and bias in a dictionary `meta`. Looked through first (`pickles.py`), then read with PyTorch's
               weights-only unpickler, which runs no code, and mapped, so that no data is read before all is checked.
*.safetensors  the same under "path.W_q", ..., each setting a small tensor: a number, or a string's characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError, named
from qzo.files.folder import Header, headers_in, one_line, opened, read_tensors_of, weight_files
from qzo.files.rewrite import Write, rewriting
from qzo.files.settings import Source
from qzo.formats.hqq.layer import HqqLinear, HqqOrigin
from qzo.formats.hqq.library import from_meta, parts
from qzo.formats.hqq.pickles import check_archive, check_sums
from qzo.models.stored import DTYPES, StoredModel, on_meta

QMODEL = "qmodel.pt"
WORDS = ".W_q"
BUFFER_OF = {"W_q": "codes", "scale": "scales", "zero": "zero_points", "bias": "bias"}
State = dict[str, dict[str, Any]]
DTYPE_NAMES = {str(dtype): dtype for dtype in DTYPES}
FLAGS = ("quant_zero", "quant_scale", "view_as_float", "channel_wise", "optimize", "round_zero", "offload_meta")
STRINGS = ("packing", "compute_dtype", "unpack_view_dtype")
SETTINGS = (*FLAGS, *STRINGS, "nbits", "group_size", "axis", "shape")
MARKS = ("encoded_state_dict", "stores_quant_config")  # of the container
MOST_CHARACTERS = 64  # of a setting
MOVING = "zero points stay, and move weights with their scales"


def find(source: Source) -> StoredModel | None:
    """The HQQ checkpoint in a folder; None where it holds something else. Raises QzoError for a damaged one."""
    folder = source.path
    if source.method not in (None, "hqq") or not folder.is_dir():
        return None
    if (folder / QMODEL).is_file():
        return _from_pickle(source)[0]
    headers = headers_in(weight_files(folder))
    if any(name.endswith(WORDS) for name in headers):
        return _from_safetensors(source, headers)
    if source.settings is not None:
        raise QzoError(f"{folder}: no tensor holds codes, and config.json says hqq")
    return None


def _write_qmodel(source: Source, tensors: dict[str, Tensor], target: Path) -> None:
    """Write `target`/qmodel.pt with some tensors replaced, named as in the model, each in the dtype it has there.

    Raises QzoError where a tensor has no place.
    """
    found, state = _from_pickle(source)
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        layer, about = found.layers.get(path), state.get(path, {})
        old = layer.scales if layer is not None and last == "scales" else about.get(last)
        if not isinstance(old, Tensor) or old.shape != tensor.shape:
            raise QzoError(f"{source.path / QMODEL} has no place for {name} with shape {tuple(tensor.shape)}")
        new = tensor.to("cpu", old.dtype)
        if layer is not None and last == "scales":
            about.get("meta", about).update({key: part for key, part in parts(layer, new).items() if "zero" not in key})
        else:
            about[last] = new
    torch.save(state, target / QMODEL)


class _Pickled(StoredModel):
    """One whose archive has checksums."""

    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """As of other checkpoints, and every byte is compared with its checksum first, at the speed of the disk."""
        check_sums(self.folder / QMODEL)
        return super().load(dtype, device)


def _from_pickle(source: Source) -> tuple[StoredModel, State]:
    """What a qmodel.pt holds, and its content."""
    file = source.path / QMODEL
    check_archive(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the unpickler, the archive or the file: all of them mean that it cannot be used
        raise QzoError(f"{file} is damaged, or holds more than tensors: {one_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(about, dict) for about in state.values()):
        raise QzoError(f"{file} is not a dictionary of layers as hqq saves it")
    headers, layers = {}, {}
    for path, about in state.items():
        for name, tensor in _tensors(about).items():
            headers[f"{path}.{name}"] = Header(file, DTYPES.get(tensor.dtype, "?"), tuple(tensor.shape))
        if "W_q" in about:
            with named(f"{file}: {path}"):
                layers[path] = _layer(about, about.get("meta", about))
    writing = partial(partial, _write_qmodel, source)
    return _Pickled("hqq", source, headers, layers, partial(_mapped, state, layers), writing, MOVING), state


def _mapped(state: State, layers: dict[str, HqqLinear]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each module by their names in the model."""
    for path, about in state.items():
        tensors = layers[path].state_dict() if path in layers else _tensors(about)
        yield {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def _tensors(about: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in about.items() if isinstance(tensor, Tensor)}


def _from_safetensors(source: Source, headers: dict[str, Header]) -> StoredModel:
    paths = {name.removesuffix(WORDS) for name in headers if name.endswith(WORDS)}
    about: dict[str, dict[str, Any]] = {path: {} for path in paths}
    settings: dict[Path, list[str]] = {}
    for name, header in headers.items():
        path, _, last = name.rpartition(".")
        if path in paths and last in BUFFER_OF:
            about[path][last] = on_meta(name, header)
        elif path in paths and last in SETTINGS:
            settings.setdefault(header.file, []).append(name)
            if header.numel > MOST_CHARACTERS:
                raise QzoError(f"{header.file}: {name} has {header.numel} numbers, which is no setting")
        elif path in paths and last not in MARKS:
            raise QzoError(f"{header.file}: {name} is not known; quantized scales are read from a qmodel.pt only")
    for file, names in settings.items():
        with opened(file) as tensors:
            for name in names:
                path, _, last = name.rpartition(".")
                about[path][last] = _decoded(last, tensors.get_tensor(name), f"{file}: {name}")
    layers = {}
    for path, found in about.items():
        with named(f"{headers[path + WORDS].file}: {path}"):
            layers[path] = _layer(found, found)
    writing = partial(_writing, source.path, headers)
    return StoredModel("hqq", source, headers, layers, partial(_read, headers, layers), writing, MOVING)


def _read(headers: dict[str, Header], layers: dict[str, HqqLinear]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file by their names in the model."""
    for file in dict.fromkeys(header.file for header in headers.values()):
        tensors = {}
        for name, tensor in read_tensors_of(file):
            path, _, last = name.rpartition(".")
            if path not in layers:
                tensors[name] = tensor
            elif last in BUFFER_OF:
                words = layers[path].layout.word_dtype
                tensors[f"{path}.{BUFFER_OF[last]}"] = tensor.view(words) if last == "W_q" else tensor
        yield tensors


def _writing(source: Path, headers: dict[str, Header], tensors: dict[str, Tensor]) -> Write:
    """Scales, as `qzo.scales` names them, into the tensors of the safetensors files. Raises QzoError."""
    found = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if last == "scales" and f"{path}{WORDS}" in headers:
            stored = f"{path}.scale"
            if stored not in headers or headers[stored].shape != tuple(tensor.shape):
                raise QzoError(f"{source} has no place for {name} with shape {tuple(tensor.shape)}")
            found[name] = {stored: tensor}
    return rewriting(source, tensors, found)


def _layer(about: dict[str, Any], meta: Any) -> HqqLinear:
    words, bias = about["W_q"], about.get("bias")
    if not isinstance(words, Tensor) or not isinstance(meta, dict) or not isinstance(bias, Tensor | None):
        raise QzoError("W_q, meta and bias are not a tensor, a dictionary and a tensor")
    kept = {key: value for key, value in meta.items() if key not in ("W_q", "bias", *MARKS)}
    return from_meta(words, kept, bias, HqqOrigin())


def _decoded(key: str, tensor: Tensor, place: str) -> Any:
    """A setting as a Python value; a dtype by its name, never by running it. Raises QzoError for another one."""
    numbers = tensor.flatten().tolist()
    if key in STRINGS:
        text = "".join(chr(number) for number in numbers if isinstance(number, int) and 0 < number < 128)
        if key == "packing":
            return text
        if text not in DTYPE_NAMES:
            raise QzoError(f"{place} is {text!r}, which is no dtype that is known here")
        return DTYPE_NAMES[text]
    if key == "shape":
        return torch.Size(numbers) if all(isinstance(n, int) and 0 < n < 2**31 for n in numbers) else None
    if len(numbers) != 1:
        raise QzoError(f"{place} has {len(numbers)} numbers, need one")
    return bool(numbers[0]) if key in FLAGS else numbers[0]
