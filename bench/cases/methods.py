"""The names of the methods, and which kind each is of."""

from __future__ import annotations

QUANTIZABLE = ("qzo", "qzo-full")  # methods whose format is a choice
METHODS = ("ft-bf16", "ft-mixed", "ft-amp", "ft-sgd", "lora", "qlora", "mezo", "qzo", "qzo-full", "qzo-2bit")
EXTRA_METHODS = ("mezo-reference", "qzo-reference", "qzo-2bit-reference")  # run only where they are asked for
ZEROTH_ORDER = ("mezo", "qzo", "qzo-full", "qzo-2bit", *EXTRA_METHODS)
BASELINES = ("ft-bf16", "ft-mixed", "ft-amp")  # AdamW in 8, 12 and 16 bytes a parameter

SMALLER = {  # methods of the same kind that hold less, the nearest first
    "ft-amp": ("ft-mixed", "ft-bf16", "ft-sgd", "lora", "qlora"),
    "ft-mixed": ("ft-bf16", "ft-sgd", "lora", "qlora"),
    "ft-bf16": ("ft-sgd", "lora", "qlora"),
    "ft-sgd": ("lora", "qlora"),
    "lora": ("qlora",),
    "qlora": (),
    "mezo": ("qzo", "qzo-full", "qzo-2bit"),
    "qzo": ("qzo-full", "qzo-2bit"),
    "qzo-full": ("qzo-2bit",),
    "qzo-2bit": (),
}

STREAMABLE = ("lora", "qlora", "mezo", "qzo", "qzo-full", "qzo-2bit")  # no gradient or moment of a whole layer
