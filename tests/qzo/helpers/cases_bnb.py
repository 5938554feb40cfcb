"""The bitsandbytes formats, as transformers writes them."""

from __future__ import annotations

from functools import partial

from bnb_files import library_logits, library_scales, untouched, write_bnb
from format_cases import FormatCase

NESTED_ROUNDING = {"llama": 3e-2, "opt": 1.2e-2}  # of logits: scales are rounded to 8 bits anew after training

CASES = [
    FormatCase(
        name=kind,
        family=family,
        write=partial(write_bnb, kind=kind),
        scales=library_scales,
        logits=library_logits,
        tolerance=NESTED_ROUNDING[family] if kind == "nf4-double" else 1e-5,
        needs=("bitsandbytes", "accelerate"),
        codes=untouched,
    )
    for kind in ("nf4", "nf4-double", "int8")
    for family in ("llama", "opt")
]
