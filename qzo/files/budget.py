"""How large a model may become while it is built, by the files that it is built for.

What a configuration asks for is known once the model stands, and a count of layers, whatever it is called and however
deep it is nested, can make that last forever. So modules and parameters are counted as they come into being.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as registration

from qzo.errors import AGAIN, QzoError

SLACK = 4  # a parameter may be made twice, and tied or shared ones are stored once
LEAST = 1_000  # parts that any model may have
MODULES = 8  # for each tensor: activations, dropout and containers have none
COUNTS = re.compile(r"n(um)?_?(hidden_|decoder_|encoder_)?layers?")
MANY = re.compile(r"layer|block|label|stage|depth|kernel|(^|_)num_")  # may be the length of a list
SIZES = re.compile(
    r"position|vocab|token|embed|ctx|frame|sample|param|dim|length|(?<!kernel_)size|window|ids?$|expert|head"
)
MOST = 2**17  # of anything that is counted in a configuration
BUFFERS = 2**28  # bytes of rotary tables and causal masks that any model may have


def check_counts(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise QzoError for a config.json with counts that nothing in `tensors` tensors can belong to.

    More layers than tensors are none of this checkpoint; other counts, of which lists are made before a model is, have
    an absolute limit.
    """
    for key, value in config.items():
        if COUNTS.fullmatch(key) and isinstance(value, int) and not 0 <= value <= tensors:
            raise QzoError(
                f"{folder}: config.json has {key}={value}, but there are only {tensors} tensors; "
                f"they do not belong together; {AGAIN}"
            )
    for key, value in _whole_numbers(config):
        if value > MOST and MANY.search(key) and not SIZES.search(key):
            raise QzoError(f"{folder}: config.json has {key}={value}; no model has more than {MOST:,}; {AGAIN}")


def _whole_numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """The name and value of every whole number, at any depth; those in a list have the list's name."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _whole_numbers(inner, name) if name != "quantization_config" else ()
    elif isinstance(value, list):
        for inner in value:
            yield from _whole_numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


@contextmanager
def at_most(numbers: int, tensors: int) -> Iterator[None]:
    """Within, building a model for files of so many numbers and tensors raises QzoError once it is far larger."""
    thread, counts = threading.get_ident(), {"weights": 0, "parameters": 0, "modules": 0}
    limits = {"weights": SLACK * numbers, "parameters": SLACK * tensors + LEAST}
    limits["modules"] = MODULES * limits["parameters"]

    def add(**more: int) -> None:
        if threading.get_ident() != thread:
            return
        for what, count in more.items():
            counts[what] += count
            if counts[what] > limits[what]:
                raise QzoError(
                    f"its configuration implies more than {limits[what]:,} {what}, but the files hold {tensors:,} "
                    f"tensors; they do not belong together; {AGAIN}"
                )

    def parameter(_module: nn.Module, _name: str, value: nn.Parameter | None) -> None:
        if value is not None:
            add(weights=value.numel(), parameters=1)

    def module(_module: nn.Module, _name: str, _value: nn.Module | None) -> None:
        add(modules=1)

    hooks = (
        registration.register_module_parameter_registration_hook(parameter),
        registration.register_module_module_registration_hook(module),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_buffers(model: nn.Module, stored: int) -> None:
    """Raise QzoError where tables that no file holds, such as causal masks, are far larger than the files."""
    size = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    if size > BUFFERS + stored:
        raise QzoError(f"config.json implies tables of {size:,} bytes, and the files have {stored:,}; {AGAIN}")


def check_factors(model: Any) -> None:
    """Raise QzoError for rotary factors that are not one positive number for each frequency of a head."""
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        rope = getattr(getattr(module, "config", None), "rope_parameters", None)
        for key in ("short_factor", "long_factor"):
            factors = rope.get(key) if isinstance(rope, dict) else None
            if frequencies is None or factors is None:
                continue
            sound = isinstance(factors, list) and all(isinstance(one, int | float) for one in factors)
            if not sound or len(factors) != frequencies.numel() or not all(0 < one < math.inf for one in factors):
                raise QzoError(f"config.json has a {key} that is not {frequencies.numel()} positive numbers; {AGAIN}")
