"""Models put together from quantized layers and plain tensors, however a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.chunked import RebuiltLinear
from qzo.errors import QzoError
from qzo.folder import Header
from qzo.packed import FLOATING, IMPLIED, finish, skeleton
from qzo.walk import freeze, put

PER_NUMBER = 32  # codes that a stored number may hold: of one bit, shown as fp32
OWN_DTYPE = ("codes", "scales", "zero_points", "offsets")  # buffers of quantized layers, not cast


def assemble(
    folder: Path,
    headers: dict[str, Header],
    plain: dict[str, Header],
    layers: Mapping[str, RebuiltLinear],
    dtype: torch.dtype,
) -> Any:
    """The model on meta, with quantized layers in the places of its linear layers; no data is read.

    Args:
        folder: of the checkpoint.
        headers: of all that is stored, against a config.json that implies far more.
        plain: of the unquantized tensors, by their names in the model.
        layers: path -> layer, its tensors on any device.
        dtype: of the unquantized tensors.

    Raises QzoError for layers and tensors that the model has no place for, and for tensors that are missing.
    """
    model = skeleton(folder, headers, dtype, PER_NUMBER)
    for path, layer in layers.items():
        _place(folder, model, path, layer)
    model.tie_weights()
    expected = model.state_dict(keep_vars=True)
    for name, header in plain.items():
        if not name.endswith(IMPLIED):
            _check(name, header, expected.get(name))
    given = {id(t) for name, t in expected.items() if name in plain or name.rpartition(".")[0] in layers}
    missing = [name for name, tensor in expected.items() if id(tensor) not in given]
    if missing:
        raise QzoError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return model


def fill(model: Any, batches: Iterable[dict[str, Tensor]], dtype: torch.dtype, device: torch.device) -> Any:
    """Give an assembled model its tensors, batch by batch, each copied out of its file; everything frozen."""
    for tensors in batches:
        ready = {}
        for name, tensor in tensors.items():
            own = name.endswith(OWN_DTYPE) or not tensor.is_floating_point()
            ready[name] = tensor.to(device, tensor.dtype if own else dtype, copy=True)
        ready = {name: tensor for name, tensor in ready.items() if not name.endswith(IMPLIED)}
        model.load_state_dict(ready, strict=False, assign=True)
    finish(model, device)
    return freeze(model).eval()


def _place(folder: Path, model: Any, path: str, layer: RebuiltLinear) -> None:
    try:
        old = model.get_submodule(path)
    except AttributeError:
        old = None
    if type(old) is not nn.Linear:
        raise QzoError(
            f"{folder}: the model has no linear layer {path}; config.json and weights do not belong together"
        )
    shape, wanted = (layer.out_features, layer.in_features), tuple(old.weight.shape)
    if shape != wanted:
        raise QzoError(f"{folder}: {path} is quantized as {shape}, but config.json implies {wanted}")
    if old.bias is not None and layer.bias is None:
        raise QzoError(f"{folder}: {path}.bias is missing")
    put(model, (path,), layer)


def _check(name: str, header: Header, wanted: Tensor | None) -> None:
    if wanted is None:
        raise QzoError(f"{header.file}: the model has no tensor {name}; config.json and weights do not belong together")
    if header.shape != tuple(wanted.shape) or header.dtype not in FLOATING:
        raise QzoError(
            f"{header.file}: {name} is {header.dtype} {header.shape}, but config.json implies F32 {tuple(wanted.shape)}"
        )
