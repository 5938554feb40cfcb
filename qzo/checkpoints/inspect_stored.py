"""What a checkpoint of HQQ or torchao holds, by its layers without data."""

from __future__ import annotations

from typing import Any

from qzo.errors import QzoError
from qzo.models.inspection import Inspection
from qzo.models.skeleton import FLOATING, IMPLIED, dtype_of
from qzo.models.stored import StoredModel, empty_stored

PARTS = ("scales", "codes", "zero_points", "offsets")


def inspect_stored(source: str, stored: StoredModel, config: dict[str, Any], settings: dict[str, Any]) -> Inspection:
    """Counts and bytes of the layers' tensors; `reason` is None just where loading needs no more than sound data.

    Bits and group size are None where the layers have several; settings that are stored as tensors are not counted.
    """
    layers = list(stored.layers.values())
    counts = dict.fromkeys((*PARTS, "unquantized"), 0)
    sizes = dict.fromkeys(counts, 0)
    for layer in layers:
        for part in PARTS:
            tensor = getattr(layer, part, None)
            if tensor is not None:
                counts[part] += layer.in_features * layer.out_features if part == "codes" else tensor.numel()
                sizes[part] += tensor.nbytes
        if layer.bias is not None:
            counts["unquantized"] += layer.bias.numel()
            sizes["unquantized"] += layer.bias.nbytes
    for name, header in stored.plain.items():
        sizes["unquantized"] += header.nbytes
        if header.dtype in FLOATING and not name.endswith(IMPLIED):
            counts["unquantized"] += header.numel
    trained = {"scales": counts["scales"], "scales+offsets": counts["scales"] + counts["offsets"]}
    trained["scales+unquantized"] = counts["scales"] + counts["unquantized"]
    return Inspection(
        source,
        stored.format,
        ", ".join(sorted({layer.type_name for layer in layers})),
        _common({layer.n_bits for layer in layers}),
        _common({layer.group_size for layer in layers}),
        settings,
        len(layers),
        counts,
        sizes,
        trained,
        _obstacle(stored, config),
    )


def _common(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None


def _obstacle(stored: StoredModel, config: dict[str, Any]) -> str | None:
    """Why the model cannot be built; None where nothing but the data could still speak against it."""
    try:
        empty_stored(stored, config, dtype_of(config))
    except QzoError as error:
        return str(error).removeprefix(f"{stored.folder}: ")
    return None
