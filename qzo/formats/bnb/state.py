"""What a bitsandbytes checkpoint says of a quantized layer: the names of its tensors, and its quant_state.

P.weight               uint8 [N K / 2, 1] codes; other dtypes hold the same bytes (`bnb_4bit_quant_storage`)
P.weight.absmax        fp32 [B] scales; with double quantization uint8 [B], and beside it
P.weight.nested_absmax fp32 [ceil(B / 256)], P.weight.nested_quant_map fp32 [256]
P.weight.quant_map     fp32 [16]
P.weight.quant_state.bitsandbytes__nf4 (or __fp4)   the rest: a JSON object as uint8

P.weight int8 [N, K], P.SCB fp32 [N] scales, P.weight_format uint8 []: 0, row by row
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.files.folder import Header, opened
from qzo.formats.bnb.layer import BLOCK_SIZES, QUANT_TYPES, TABLE
from qzo.formats.bnb.nesting import NESTED_BLOCK

ABSMAX, SCB, ROW_FORMAT = "weight.absmax", "SCB", "weight_format"
NESTED_ABSMAX, NESTED_MAP, QUANT_MAP = "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map"
STATE = "weight.quant_state.bitsandbytes__"
STATE_BYTES = 4096  # a quant_state takes less than 250
DTYPES = ("float32", "float16", "bfloat16")
Wanted = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class QuantState:
    """The numbers of a 4-bit layer.

    Args:
        quant_type: "nf4" or "fp4".
        block_size: weights that share a scale.
        shape: N, K.
        dtype: of the weight that was quantized, which the library dequantizes to.
        offset: the mean of the scales, of double quantization; None without.
    """

    quant_type: str
    block_size: int
    shape: tuple[int, int]
    dtype: str
    offset: float | None

    def to_tensor(self) -> Tensor:
        """The JSON text, uint8 [bytes], to the byte as the library writes it."""
        plain = {"quant_type": self.quant_type, "blocksize": self.block_size, "dtype": self.dtype, "shape": self.shape}
        nested = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}
        text = json.dumps(plain if self.offset is None else plain | nested)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)


def parse_state(text: bytes, quant_type: str) -> QuantState:
    """The quant_state in a JSON text. Raises QzoError for what the library does not write."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QzoError("its quant_state is no JSON") from error
    if not isinstance(state, dict):
        raise QzoError("its quant_state is not a JSON object")
    _check_is(state, "quant_type", (quant_type,))
    _check_is(state, "blocksize", BLOCK_SIZES)
    _check_is(state, "dtype", DTYPES)
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise QzoError(f"its quant_state has shape={_shown(shape)}, not two positive whole numbers")
    offset = state.get("nested_offset")
    if "nested_blocksize" in state or offset is not None:
        _check_is(state, "nested_blocksize", (NESTED_BLOCK,))
        _check_is(state, "nested_dtype", ("float32",))
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise QzoError(f"its quant_state has nested_offset={_shown(offset)}, not a finite number")
    return QuantState(quant_type, state["blocksize"], (shape[0], shape[1]), state["dtype"], offset)


def _check_is(state: dict[str, Any], key: str, known: tuple[Any, ...]) -> None:
    value = state.get(key)
    if not any(value == one and type(value) is type(one) for one in known):
        raise QzoError(f"its quant_state has {key}={_shown(value)}; need {' or '.join(map(str, known))}")


def _shown(value: Any) -> str:
    return repr(value)[:60]


def read_states(headers: dict[str, Header]) -> dict[str, QuantState]:
    """Path -> quant_state of every 4-bit layer of some safetensors files. Raises QzoError, with the layer's name."""
    named = {name: part for name in headers if (part := name.rpartition(STATE))[1]}
    by_file: dict[Path, list[str]] = {}
    for name in named:
        by_file.setdefault(headers[name].file, []).append(name)
    found: dict[str, QuantState] = {}
    for file, names in by_file.items():
        with opened(file) as tensors:
            for name in names:
                path, _, quant_type = named[name]
                header = headers[name]
                is_text = header.dtype == "U8" and len(header.shape) == 1 and header.numel <= STATE_BYTES
                if quant_type not in QUANT_TYPES or not is_text:
                    raise QzoError(
                        f"{file}: {name} is {header.dtype} {header.shape}; it is no quant_state of NF4 or FP4"
                    )
                try:
                    found[path.removesuffix(".")] = parse_state(bytes(tensors.get_tensor(name).tolist()), quant_type)
                except QzoError as error:
                    raise QzoError(f"{file}: {path.removesuffix('.')}: {error}") from error
    return found


def quantized_paths(headers: Iterable[str]) -> set[str]:
    """Paths of the layers of whose codes a checkpoint has the scales, or the quant_state."""
    scaled = {name.removesuffix(f".{part}") for name in headers for part in (ABSMAX, SCB) if name.endswith(f".{part}")}
    return scaled | {name.partition(f".{STATE}")[0] for name in headers if f".{STATE}" in name}


def check_parts(path: str, shape: tuple[int, int], headers: dict[str, Header], state: QuantState | None) -> set[str]:
    """The names of a layer's tensors, of an [N, K] weight; int8 without a `state`. Raises QzoError for wrong ones."""
    wanted = _wanted_8bit(shape) if state is None else _wanted_4bit(shape, state)
    absmax = headers.get(f"{path}.{ABSMAX}")
    if absmax is not None and absmax.dtype == "BF16":
        raise QzoError(
            f"{absmax.file}: {path}.{ABSMAX} is BF16: a CPU kernel of bitsandbytes rewrote it before it was saved, "
            "and the codes no longer fit it; quantize the model again and save it before its first forward"
        )
    for part, (dtypes, size) in wanted.items():
        header = headers.get(f"{path}.{part}")
        if header is None and part == ROW_FORMAT:
            continue  # not in files of old versions
        if header is None:
            raise QzoError(f"{path}.{part} is missing")
        fits = header.shape == size if dtypes else header.nbytes == math.prod(size)
        if not fits or (dtypes and header.dtype not in dtypes):
            raise QzoError(
                f"{header.file}: {path}.{part} is {header.dtype} {header.shape}, but config.json and quant_state imply "
                f"{dtypes[0] if dtypes else 'U8'} {size}"
            )
    return {f"{path}.{part}" for part in wanted if f"{path}.{part}" in headers} | (
        set() if state is None else {f"{path}.{STATE}{state.quant_type}"}
    )


def _wanted_4bit(shape: tuple[int, int], state: QuantState) -> Wanted:
    """Part -> dtypes (none: only the bytes count) and shape."""
    if state.shape != shape:
        raise QzoError(f"its quant_state has shape={list(state.shape)}, but config.json implies {list(shape)}")
    numel = math.prod(shape)
    blocks, double = -(-numel // state.block_size), state.offset is not None
    wanted: Wanted = {
        "weight": ((), (-(-numel // 2), 1)),
        ABSMAX: (("U8",) if double else ("F32",), (blocks,)),
        QUANT_MAP: (("F32",), (TABLE,)),
    }
    if double:
        wanted |= {NESTED_ABSMAX: (("F32",), (-(-blocks // NESTED_BLOCK),)), NESTED_MAP: (("F32",), (256,))}
    return wanted


def _wanted_8bit(shape: tuple[int, int]) -> Wanted:
    return {"weight": (("I8",), shape), SCB: (("F32",), (shape[0],)), ROW_FORMAT: (("U8",), ())}
