"""What a test of every format needs to know of one: how its own library writes and reads a checkpoint.

Each `cases_<format>.py` beside this file has a list `CASES`; `test_formats.py` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    """

    name: str
    family: str
    write: Callable[[Path, Path], None]
    scales: Callable[[Path], dict[str, Tensor]]
    logits: Callable[[Path, Tensor], Tensor]
    tolerance: float = 1e-4
    needs: tuple[str, ...] = ()
    suffix: str = ""
