"""Models put together from quantized layers and plain tensors, however a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.models.folder import Header
from qzo.models.inspection import Inspection, obstacle
from qzo.models.rewrite import Write
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
from qzo.models.walk import freeze, put

PER_NUMBER = 32  # codes that a stored number may hold: of one bit, shown as fp32
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
DTYPES |= {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.int8: "I8"}
PARTS = ("scales", "codes", "zero_points", "offsets")  # and g_idx, where layers have one
OWN_DTYPE = ("codes", "scales", "zero_points", "offsets")  # buffers of quantized layers, not cast


@dataclass(frozen=True)
class StoredModel:
    """What a folder holds whose layers follow from headers and settings, without a model to put them in.

    Args:
        format: quant_method.
        source: the folder and its settings.
        headers: of all stored tensors, by their stored names.
        layers: path -> quantized layer, its tensors on meta or on mapped memory.
        batches: () -> the tensors by their names in the model, file by file.
        writing: tuned tensors by their names in the model -> what writes the weights with them into a folder.
        moving: what moves with scales, see `Inspection`.
    """

    format: str
    source: Source
    headers: dict[str, Header]
    layers: dict[str, Any]
    batches: Callable[[], Iterable[dict[str, Tensor]]]
    writing: Callable[[dict[str, Tensor]], Write]
    moving: str
    saved_as: ClassVar[str | None] = None

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.source.path

    @property
    def plain(self) -> dict[str, Header]:
        """Headers of the tensors outside of quantized layers."""
        return {name: h for name, h in self.headers.items() if name.rpartition(".")[0] not in self.layers}

    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """The model with quantized layers on the tensors of the files, everything frozen; the rest is cast to `dtype`.

        Memory: itself and the tensors of one file. Raises QzoError for what does not belong together, before data is
        read.
        """
        dtype = dtype or dtype_of(self.source.config)
        model = empty_stored(self, dtype)
        for layer in self.layers.values():
            layer.compute_dtype = dtype  # of all around it
        for tensors in self.batches():
            ready = {}
            for name, tensor in tensors.items():
                own = name.endswith(OWN_DTYPE) or not tensor.is_floating_point()
                if not name.endswith(IMPLIED):
                    ready[name] = tensor.to(device, tensor.dtype if own else dtype, copy=True)
            model.load_state_dict(ready, strict=False, assign=True)
        finish(model, device)
        return freeze(model).eval()

    def inspect(self, name: str) -> Inspection:
        """Counts and bytes of the layers' tensors; `reason` is None just where loading needs no more than sound data.

        Bits and group size are None where the layers have several; settings that are stored as tensors are not counted.
        """
        layers = list(self.layers.values())
        counts = dict.fromkeys((*PARTS, "unquantized"), 0)
        sizes = dict.fromkeys(counts, 0)
        for layer in layers:
            packed = {"codes": layer.in_features * layer.out_features, "zero_points": layer.scales.numel()}
            for part in (*PARTS, "g_idx"):
                tensor = getattr(layer, part, None)
                if tensor is not None:
                    counts[part] = counts.get(part, 0) + packed.get(part, tensor.numel())
                    sizes[part] = sizes.get(part, 0) + tensor.nbytes
            if layer.bias is not None:
                counts["unquantized"] += layer.bias.numel()
                sizes["unquantized"] += layer.bias.nbytes
        for stored, header in self.plain.items():
            sizes["unquantized"] += header.nbytes
            if header.dtype in FLOATING and not stored.endswith(IMPLIED):
                counts["unquantized"] += header.numel
        trained = {"scales": counts["scales"], "scales+offsets": counts["scales"] + counts["offsets"]}
        trained["scales+unquantized"] = counts["scales"] + counts["unquantized"]
        return Inspection(
            name,
            self.format,
            ", ".join(sorted({layer.type_name for layer in layers})),
            _common({layer.n_bits for layer in layers}),
            _common({layer.group_size for layer in layers}),
            self.source.settings or {},
            len(layers),
            counts,
            sizes,
            trained,
            obstacle(self.folder, lambda: empty_stored(self, dtype_of(self.source.config))),
            self.moving,
        )


def _common(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None


def empty_stored(stored: StoredModel, dtype: torch.dtype) -> Any:
    """The model on meta, with quantized layers in the places of its linear layers; no data is read.

    Raises QzoError for layers and tensors that the model has no place for, and for tensors that are missing.
    """
    folder, config = stored.folder, stored.source.config
    check_counts(folder, config, len(stored.headers))
    check_architecture(folder, config)
    model = skeleton(folder, stored.headers, dtype, PER_NUMBER)
    for path, layer in stored.layers.items():
        _place(folder, model, path, layer)
    own = {f"{path}.{name}" for path, layer in stored.layers.items() for name in layer.state_dict()}
    check_tensors(folder, model, stored.plain, own)
    return model


def _place(folder: Path, model: Any, path: str, layer: Any) -> None:
    try:
        old = model.get_submodule(path)
    except AttributeError:
        old = None
    if old is None:
        raise QzoError(
            f"{folder}: the model has no linear layer {path}; config.json and weights do not belong together"
        )
    if type(old) is not nn.Linear:
        raise QzoError(f"{folder}: {path} is a quantized {type(old).__name__}; only linear layers are trained")
    shape, wanted = (layer.out_features, layer.in_features), tuple(old.weight.shape)
    if shape != wanted:
        raise QzoError(f"{folder}: {path} is quantized as {shape}, but config.json implies {wanted}")
    if old.bias is not None and layer.bias is None:
        raise QzoError(f"{folder}: {path}.bias is missing")
    put(model, (path,), layer)


def on_meta(name: str, header: Header) -> Tensor:
    """A tensor without data of what a header says. Raises QzoError for a dtype that no format here has."""
    dtype = next((dtype for dtype, word in DTYPES.items() if word == header.dtype), None)
    if dtype is None:
        raise QzoError(f"{header.file}: {name} is {header.dtype}, which is not known here")
    return torch.empty(header.shape, dtype=dtype, device="meta")
