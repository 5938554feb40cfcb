"""Where a model came from, kept with it in memory, so that it can be written as it came."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qzo.errors import QzoError

ATTRIBUTE = "_qzo_origin"
HIDDEN = "save_pretrained"  # the method of transformers that would write codes without a word of what they are


@dataclass(frozen=True)
class Origin:
    """What a model was loaded from.

    Args:
        path: absolute, of a folder or a .gguf file.
        packed: whether the model has the codes of the files; False for an unquantized or dequantized one.
        settings: what its configuration said of the quantizer, as it was read; None where nothing did.
        tuned: names of tensors that a run had tuned, so that they are other than those of the files.
    """

    path: Path
    packed: bool = False
    settings: dict[str, Any] | None = None
    tuned: tuple[str, ...] = ()


def note_origin(model: nn.Module, origin: Origin) -> None:
    """Keep it with a model; it survives `copy.deepcopy` and pickling."""
    setattr(model, ATTRIBUTE, origin)


def origin_of(model: nn.Module) -> Origin | None:
    """Where a model came from; None for one that was not loaded here."""
    origin: Origin | None = getattr(model, ATTRIBUTE, None)
    return origin


def replace_save_pretrained(model: nn.Module, save: Any) -> None:
    """Let `model.save_pretrained(...)` call `save(model, ...)`; nothing for a model that has no such method."""
    if hasattr(model, HIDDEN):
        setattr(model, HIDDEN, partial(save, model))


def restore_save_pretrained(model: nn.Module) -> None:
    """Give a model the method of its class back."""
    vars(model).pop(HIDDEN, None)


def refuse_save_pretrained(model: nn.Module, *_: Any, **__: Any) -> None:
    """In the place of `save_pretrained`, of a model whose layers were taken over. Raises QzoError."""
    raise QzoError(
        f"this {type(model).__name__} was taken over by qzo.adopt, and would be written without its settings; "
        "call qzo.release(model) first"
    )
