"""Settings of single layers, as gptqmodel keeps them under "dynamic": bits or group size of their own, or none at all.

    "dynamic": {"+:.*\\.down_proj": {"bits": 8, "group_size": 32}, "-:.*\\.mlp\\.gate": {}}

A name is a regular expression that must match a layer's path from its start, after "+:" (or nothing) for other settings
and after "-:" for a layer that is not quantized. The first that matches counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError, named
from qzo.files.patterns import Pattern

SKIP, OTHER = "-:", "+:"
PLAIN = (16, 32)  # bits of a layer that AutoRound leaves as it is
MOST_RULES = 10_000  # each of them may be tried on each layer


@dataclass(frozen=True)
class LayerSettings:
    """What holds for one layer.

    Args:
        n_bits: of a code.
        group_size: weights along K that share a scale, -1 for the whole row.
        own: the expression that it follows from; None where the layer has the settings of all.
    """

    n_bits: int
    group_size: int
    own: str | None = None


@dataclass(frozen=True)
class Dynamic:
    """Settings of all layers and those of single ones, by expression, in their order; None for those not quantized."""

    usual: LayerSettings
    rules: tuple[tuple[Pattern, LayerSettings | None], ...] = ()

    def of(self, path: str) -> LayerSettings:
        """Those of a layer with codes. Raises QzoError where there is a rule that it has none."""
        for pattern, settings in self.rules:
            if pattern.matches(path):
                if settings is None:
                    raise QzoError(
                        f'it has codes, but "dynamic" in quantization_config says that it has none ("'
                        f'{pattern.text}"); take config.json and weights from one checkpoint'
                    )
                return settings
        return self.usual


def dynamic_of(n_bits: int, group_size: int, rules: Any) -> Dynamic:
    """By the settings of all layers and what stands under "dynamic". Raises QzoError for rules that are none."""
    usual = LayerSettings(n_bits, group_size)
    if not rules:
        return Dynamic(usual)
    if not isinstance(rules, dict):
        raise QzoError('"dynamic" in quantization_config is not an object of rules; mend config.json')
    if len(rules) > MOST_RULES:
        raise QzoError(
            f'"dynamic" in quantization_config has {len(rules):,} rules; join them to {MOST_RULES:,} or fewer'
        )
    found: list[tuple[Pattern, LayerSettings | None]] = []
    for name, settings in rules.items():
        with named('"dynamic" in quantization_config'):
            pattern = Pattern(name, SKIP, OTHER)
        if name.startswith(SKIP):
            found.append((pattern, None))
            continue
        if not isinstance(settings, dict):
            raise QzoError(f'"dynamic" in quantization_config: the settings of {name!r} are no object; mend it')
        values = settings.get("bits", n_bits), settings.get("group_size", group_size)
        if not all(type(value) is int for value in values):
            raise QzoError(f'"dynamic" in quantization_config: bits and group_size of {name!r} must be whole numbers')
        found.append((pattern, LayerSettings(*values, own=name)))
    return Dynamic(usual, tuple(found))


def rules_of(layers: Any) -> dict[str, Any]:
    """What AutoRound says of single layers ("extra_config": path -> settings), as rules of "dynamic".

    A layer of 16 bits has no codes. Raises QzoError for what is no such object.
    """
    if not isinstance(layers or {}, dict) or not all(isinstance(own, dict) for own in (layers or {}).values()):
        raise QzoError('"extra_config" in quantization_config is not an object of layers; mend config.json')
    return {f"^{re.escape(path)}$": own for path, own in (layers or {}).items() if own.get("bits") not in PLAIN}
