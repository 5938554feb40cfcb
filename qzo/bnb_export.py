"""Tuned scales in the tensors in which a bitsandbytes checkpoint keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qzo.bnb_nesting import nest, unnest
from qzo.bnb_state import ABSMAX, NESTED_ABSMAX, NESTED_MAP, SCB, STATE, QuantState, read_states
from qzo.errors import QzoError, named
from qzo.folder import Header, opened


def bnb_tensors(source: Path, headers: dict[str, Header], tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name of a scale, as `qzo.scales` has it -> the tensors of the checkpoint that it becomes.

    Plain scales get another name. With double quantization they are quantized again as the library does it, all scales
    of a layer together; where not one of them changed, the layer's tensors stay as they are, to the byte.

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
