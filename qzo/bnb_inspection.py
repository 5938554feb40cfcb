"""What the headers of a bitsandbytes checkpoint say of its parts; of tensors, only the quant_state texts are read."""

from __future__ import annotations

from typing import Any

from qzo.bnb_load import layer_of
from qzo.bnb_state import ABSMAX, NESTED_ABSMAX, SCB, quantized_paths, read_states
from qzo.errors import QzoError
from qzo.folder import Header
from qzo.packed import FLOATING, IMPLIED

PARTS = {"weight": "codes", ABSMAX: "scales", SCB: "scales", NESTED_ABSMAX: "scales"}


def bnb_parts(headers: dict[str, Header], n_bits: int) -> tuple[dict[str, int], dict[str, int]]:
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


def bnb_facts(settings: dict[str, Any], headers: dict[str, Header]) -> dict[str, Any]:
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
