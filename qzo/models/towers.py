"""What of a multimodal model is no text: its towers and projectors, which training on text leaves alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from qzo.files.names import TEXT_PARTS

T = TypeVar("T")


def towers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the parts beside the text part; none for a model of text alone.

    No gradient and no difference of losses reaches them from text: noise would move them, and nothing call them back.
    """
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        config: Any = getattr(module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if text is not config and any(name in TEXT_PARTS for name in children):
            found += [f"{path}.{name}" if path else name for name, child in children.items() if _is_tower(name, child)]
    return tuple(found)


def of_text(model: nn.Module, named: dict[str, T]) -> dict[str, T]:
    """Those of named things of a model whose path leads to no tower."""
    beside = towers(model)
    return {name: value for name, value in named.items() if not within(name, beside)}


def within(path: str, parts: Iterable[str]) -> bool:
    """Whether a path is that of one of these parts, or of something in it."""
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def _is_tower(name: str, part: nn.Module) -> bool:
    return name not in (*TEXT_PARTS, "lm_head") and next(part.parameters(), None) is not None
