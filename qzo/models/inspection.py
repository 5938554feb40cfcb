"""What is told of a checkpoint that was inspected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qzo.errors import NotFinite, QzoError

WHOLE_ZEROS = "zero points are whole numbers and move with their scales"


@dataclass(frozen=True)
class Inspection:
    """A checkpoint by its metadata; bytes are those of its files, counts are numbers of numbers.

    Args:
        model: as given.
        format: quant_method, "unquantized" or "gguf".
        version: of the format, where it has one.
        n_bits, group_size: as the configuration says.
        settings: all that it says of the quantizer.
        layers: with codes.
        counts, sizes: numbers and bytes of "scales", "codes", "zero_points", "g_idx", "codebooks", "offsets", "tables"
            (of codes and of double quantization) and "unquantized"; empty for a foreign format. Where `reason` is one,
            packed words are counted.
        trainable: set of `qzo.trainable` -> how many numbers it trains; empty for foreign formats.
        reason: why QZO cannot train it here; None where it can.
        finite: False where the reason is a number in the files that is NaN or infinite; not in the record.
        moving: what moves along with scales, counted in "scales+offsets", in words for people; not in the record.
    """

    model: str
    format: str
    version: str | None = None
    n_bits: int | None = None
    group_size: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    layers: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    trainable: dict[str, int] = field(default_factory=dict)
    reason: str | None = None
    moving: str = ""
    finite: bool = True

    def to_json(self) -> dict[str, Any]:
        """The record that `qzo inspect --json` writes."""
        record = asdict(self)
        record["bytes"] = record.pop("sizes")
        del record["moving"], record["finite"]
        return {**record, "trains_here": self.reason is None}


def obstacle(path: Path, build: Callable[[], object]) -> tuple[str | None, bool]:
    """Why a model cannot be built, by the QzoError of `build`; None where nothing but the data could be at fault.

    And whether it is something else than a number that is not finite.
    """
    try:
        build()
    except QzoError as error:
        return str(error).removeprefix(f"{path}: "), not isinstance(error, NotFinite)
    return None, True
