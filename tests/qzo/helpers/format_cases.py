"""What a test of every format needs to know of one: how its own library writes and reads a checkpoint.

Each `cases_<format>.py` beside this file has a list `CASES`; `test_formats.py` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class FormatCase:
    """A format, by functions on folders (or .gguf files), of which none uses what is tested.

    Args:
        name: e.g. "nf4-double"; also the id of the test.
        family: of the tiny model, "llama" or "opt".
        write: `write(plain, out)` quantizes the unquantized transformers checkpoint `plain` and saves it as `out`.
        scales: `scales(out)` is layer path -> scales, fp32, any shape, of the library's own state dict.
        logits: `logits(out, input_ids)` is what the library computes in fp32 from a checkpoint, [B, T, V].
        tolerance: largest difference of logits that the rounding of the format explains.
        needs: modules without which the case skips.
        suffix: of what `write` makes, "" for a folder.
        codes: `codes(out)` is name -> tensor as stored, of all that training must leave to the bit. None takes every
            tensor of the safetensors files but those whose name ends as the scales of a format do (`SCALES`).
    """

    name: str
    family: str
    write: Callable[[Path, Path], None]
    scales: Callable[[Path], dict[str, Tensor]]
    logits: Callable[[Path, Tensor], Tensor]
    tolerance: float = 1e-4
    needs: tuple[str, ...] = ()
    suffix: str = ""
    codes: Callable[[Path], dict[str, Tensor]] | None = None


SCALES = ("scales", "scale", "absmax", "nested_absmax", "SCB")


def stored_codes(case: FormatCase, out: Path) -> dict[str, Tensor]:
    """Name -> tensor of all that a tuned checkpoint must have in common with the original."""
    if case.codes is not None:
        return case.codes(out)
    tensors: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALES)}
