"""Which layers of a model are quantized: those that patterns leave, and that the layout can hold."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qzo.errors import QzoError, named
from qzo.kernels.rounding.sizes import check_layout
from qzo.models.experts import check_experts, looks_like_experts
from qzo.models.towers import towers, within
from qzo.models.walk import LinearShape, Site, candidates, computes_as_linear, is_conv1d

Patterns = str | Iterable[str] | None
EXPRESSION = "re:"
# Mamba multiplies with the weight itself; indexers of sparse attention and HunYuan's router ask for its dtype; RWKV
# halves it every few layers
READ_DIRECTLY = ("dt_proj", "weights_proj", "wg", "attention.output", "feed_forward.value")
Check = Callable[
    [LinearShape, str], object
]  # shape and name of a layer, "" for none; raises QzoError for what a layout cannot hold
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """What is quantized, and what stays in 16 bits.

    Args:
        sites: to be quantized.
        left: path of a layer that could be meant too -> why it is left.
    """

    sites: list[Site]
    left: dict[str, str]

    def keeps(self, path: str) -> bool:
        """Whether a layer, or what it is part of, stays as it is."""
        return any(part in self.left for part in _with_parents(path))

    def tell(self) -> None:
        """Log, in one line, what was left though nobody asked for it; layers that differ in their number alone once."""
        unasked: dict[tuple[str, str], int] = {}
        for path, reason in self.left.items():
            if reason:
                key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path), reason
                unasked[key] = unasked.get(key, 0) + 1
        if unasked:
            layers = "; ".join(f"{count} x {path} ({reason})" for (path, reason), count in unasked.items())
            log.warning("left in 16 bits: %s", layers)


def select(model: nn.Module, n_bits: int, group_size: int, skip: Patterns, only: Patterns) -> Selection:
    """The layers of a model that are to be quantized; see `qzo.quantize` for the patterns.

    Of a multimodal model the text part is quantized alone, unless `only` names more. Raises QzoError for patterns that
    name nothing, for values that are not finite, and where the layout can hold less than half of the weights that are
    asked for.
    """
    sites = candidates(model)
    keep, take = _matcher("skip", skip, sites), _matcher("only", only, sites)
    left = {
        site.paths[0]: "" for site in sites if keep(site.paths[0]) or (only is not None and not take(site.paths[0]))
    }
    if only is None:
        left = {**of_towers(model, sites), **left}
    asked = [site for site in sites if site.paths[0] not in left]
    if not asked:
        raise QzoError("skip and only leave no layer to quantize; name fewer layers in skip, or others in only")

    def check(shape: LinearShape, name: str = "") -> None:
        if not name:
            check_layout(shape.in_features, shape.out_features, n_bits, group_size)
            return
        common = math.gcd(*(shape.in_features for site in asked for _, shape in site.shapes()))
        with named(name):
            check_layout(shape.in_features, shape.out_features, n_bits, group_size, common)

    held = select_held(asked, check)
    for site in held.sites:
        with named(site.paths[0]):
            _check_finite(site.module)
    return Selection(held.sites, left | held.left)


def of_towers(model: nn.Module, sites: list[Site]) -> dict[str, str]:
    """Path of each layer beside the text part of a multimodal model -> why it stays in 16 bits."""
    beside = towers(model)
    return {site.paths[0]: "no part of the language model" for site in sites if within(site.paths[0], beside)}


def select_held(asked: list[Site], check: Check) -> Selection:
    """The layers that a layout can hold, as `check` tells; the others stay in 16 bits.

    Raises QzoError for experts of an unknown make, and where less than half of the weights can be held.
    """
    for site in asked:
        if looks_like_experts(site.module):
            check_experts(site.paths[0], site.module)
    reasons = {site.paths[0]: _reason(site, check) for site in asked}
    chosen = [site for site in asked if reasons[site.paths[0]] is None]
    left = {path: reason for path, reason in reasons.items() if reason is not None}
    if 2 * sum(map(_weights, chosen)) < sum(map(_weights, asked)):
        _refuse(asked, check, left)
    return Selection(chosen, left)


def _refuse(asked: list[Site], check: Check, reasons: dict[str, str]) -> None:
    """Raise QzoError with what would suit all layers that are asked for."""
    for site in asked:
        for name, shape in site.shapes():
            check(shape, name)
    path, reason = next(iter(reasons.items()))
    raise QzoError(f"{path}: {reason}; that is most of the model: start from one with plain nn.Linear layers")


def _matcher(what: str, patterns: Patterns, sites: list[Site]) -> Callable[[str], bool]:
    """Whether a path, or a module around it, has one of the names. Raises QzoError for one that names nothing."""
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    tests = {pattern: _test(what, pattern) for pattern in given}
    for pattern, test in tests.items():
        if not any(test(part) for site in sites for path in site.paths for part in _with_parents(path)):
            raise QzoError(
                f"{what}: {pattern!r} names no layer that is quantized here, such as {sites[0].paths[0]}; name one"
            )
    return lambda path: any(test(part) for test in tests.values() for part in _with_parents(path))


def _test(what: str, pattern: str) -> Callable[[str], bool]:
    if pattern.startswith(EXPRESSION):
        try:
            expression = re.compile(pattern.removeprefix(EXPRESSION))
        except re.error as error:
            raise QzoError(f"{what}: {pattern!r} is no regular expression: {error}; mend it") from error
        return lambda path: expression.match(path) is not None
    return lambda path: fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _with_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _reason(site: Site, check: Check) -> str | None:
    """Why the layout cannot hold a module; None where it can."""
    module = site.module
    if not (looks_like_experts(module) or is_conv1d(module) or computes_as_linear(module)):
        return f"cannot quantize a {type(module).__name__}, which does not compute as nn.Linear"
    if f".{site.paths[0]}".endswith(tuple(f".{name}" for name in READ_DIRECTLY)):
        return "its weight is read by a module around it"
    for _, shape in site.shapes():
        try:
            check(shape, "")
        except QzoError as error:
            return str(error).partition(";")[0]
    return None


def _weights(site: Site) -> int:
    return sum(parameter.numel() for parameter in site.module.parameters(recurse=False))


def _check_finite(module: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.is_meta and not bool(torch.isfinite(torch.stack(parameter.detach().aminmax())).all()):
            raise QzoError(f"{name} has values that are not finite; take the weights from where they are sound")
