"""Which scheme each layer has: the targets of config groups, and what is ignored.

A name among the targets is the path of a layer, "re:" and an expression that matches a path from its start, or the
class of modules. Where several match, paths go before expressions and both before classes, each by the alphabet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qzo.errors import OTHER, QzoError, advised, named
from qzo.files.patterns import Pattern
from qzo.formats.compressed.scheme import Scheme, scheme_of

CLASSES = ("Linear", "Module")  # of the modules that may have codes here
EXPRESSION = "re:"
MOST_NAMES = 10_000  # each of them may be tried on each layer


@dataclass(frozen=True)
class Schemes:
    """What a quantization_config says.

    Args:
        targets: name -> scheme, None for layers that are left as they are; in the order in which they are asked.
        ignore: names of layers that have no codes.
        patterns: of the names that are expressions.
    """

    targets: dict[str, Scheme | None]
    ignore: tuple[str, ...]
    patterns: dict[str, Pattern]

    def of(self, path: str) -> Scheme:
        """That of a layer with codes. Raises QzoError where the settings say that it has none."""
        ignored = next((name for name in self.ignore if self._matches(name, path) or name in CLASSES), None)
        if ignored is not None:
            raise QzoError(f'it has codes, but "ignore" in quantization_config has {ignored}')
        names = [name for name in self.targets if self._matches(name, path)]
        names += [name for name in self.targets if name in CLASSES]
        scheme = self.targets[names[0]] if names else None
        if scheme is None:
            raise QzoError("it has codes, but no config group quantizes the weights of such a linear layer")
        return scheme

    def _matches(self, name: str, path: str) -> bool:
        return self.patterns[name].matches(path) if name in self.patterns else name == path


@advised(OTHER)
def schemes_of(settings: dict[str, Any]) -> Schemes:
    """What is to be read by the settings. Raises QzoError for what cannot be trained here, and for damaged ones."""
    if settings.get("kv_cache_scheme") is not None:
        raise QzoError("kv_cache_scheme: keys and values are quantized too; only weight-only quantization is trained")
    for name in ("sparsity_config", "transform_config"):
        about = settings.get(name) or {}
        if not isinstance(about, dict) or (about and about.get("format") != "dense"):
            raise QzoError(f"{name}: sparse and rotated weights are not supported; only quantized ones are trained")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise QzoError("config_groups is not a JSON object with groups")
    targets: dict[str, Scheme | None] = {}
    for name, group in groups.items():
        with named(f"config_groups: {name}"):
            if not isinstance(group, dict):
                raise QzoError("it is not a JSON object")
            own = _names(group.get("targets"), "targets")
            targets |= dict.fromkeys(own, scheme_of(group, settings.get("format")))
    ordered = sorted(targets, key=lambda name: (EXPRESSION in name, name))
    ignore = tuple(_names(settings.get("ignore") or [], "ignore"))
    patterns = {name: Pattern(name, EXPRESSION) for name in (*ordered, *ignore) if name.startswith(EXPRESSION)}
    return Schemes({name: targets[name] for name in ordered}, ignore, patterns)


def _names(value: Any, what: str) -> list[str]:
    """A list of names. Raises QzoError."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise QzoError(f"{what} is not a list of names")
    if len(value) > MOST_NAMES:
        raise QzoError(f"{what} has {len(value):,} names; no more than {MOST_NAMES:,} are read")
    return value
