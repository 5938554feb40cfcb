"""The fine-tuning methods, each one function: case and world in, model, optimizer and step out."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases.case import BenchCase
from bench.cases.recipes.table import WHOLE
from bench.methods.adapters import lora, qlora
from bench.methods.as_released import mezo_reference, qzo_2bit_reference, qzo_reference
from bench.methods.baselines import dora, lora_fa, prefix, qlora_lean
from bench.methods.full import ft_amp, ft_bf16, ft_mixed, ft_sgd
from bench.methods.peqa import peqa, peqa_lean
from bench.methods.prepared import Prepared
from bench.methods.recipes import or_recipe
from bench.methods.world import World
from bench.methods.zeroth_order import mezo, qzo_2bit, qzo_4bit, qzo_full

METHODS: dict[str, Callable[[BenchCase, World], Prepared]] = {
    "ft-bf16": ft_bf16,
    "ft-mixed": ft_mixed,
    "ft-amp": ft_amp,
    "ft-sgd": ft_sgd,
    "lora": lora,
    "lora-fa": lora_fa,
    "dora": dora,
    "prefix": prefix,
    "qlora": qlora,
    "qlora-lean": qlora_lean,
    "peqa": peqa,
    "peqa-lean": peqa_lean,
    "mezo": mezo,
    "qzo": qzo_4bit,
    "qzo-full": qzo_full,
    "qzo-2bit": qzo_2bit,
    "mezo-reference": mezo_reference,
    "qzo-reference": qzo_reference,
    "qzo-2bit-reference": qzo_2bit_reference,
}

METHODS |= {name: or_recipe(METHODS[name]) for name in WHOLE}

__all__ = ["METHODS", "Prepared"]
