"""Quantized models of other libraries, in memory: taken over to be trained, and given back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qzo.errors import QzoError, advised, named
from qzo.formats.table import LIBRARIES
from qzo.models.origin import refuse_save_pretrained, replace_save_pretrained, restore_save_pretrained
from qzo.models.walk import freeze, put

Make = Callable[[nn.Module], nn.Module | None]


def adopt(model: nn.Module) -> nn.Module:
    """Replace the quantized layers of other libraries by layers whose scales can be trained; returns the model.

    In place, on the same codes: nothing is dequantized, and kernels that keep a copy of the scales are left behind.
    What remains is frozen, and the model put in eval mode, ready for `qzo.scales` and `qzo.QZO`; a model of
    transformers no longer calls itself quantized, so that `qzo.QZOTrainer` takes it. `release` undoes it; do that
    before you save.

    Raises QzoError, with the layer's name, before the first one is replaced: where there is none, and for a layer in a
    state that cannot be taken over.
    """
    layers = _each(model, _adopted)
    if not layers:
        raise QzoError(f"{type(model).__name__} has no quantized layer of a known library; see qzo.load")
    _replace(model, layers)
    replace_save_pretrained(model, refuse_save_pretrained)
    if hasattr(model, "hf_quantizer"):
        model.is_quantized = False  # type: ignore[assignment]
    return freeze(model).eval()


def release(model: nn.Module) -> nn.Module:
    """Put modules of the library that made them in the place of adopted layers, with the trained scales; returns it.

    In place, on the same codes. Raises QzoError where no layer can be given back.
    """
    layers = _each(model, _released)
    if not layers:
        raise QzoError(
            f"{type(model).__name__} has no layer to give back; it is not of qzo.adopt: leave qzo.release out"
        )
    _replace(model, layers)
    restore_save_pretrained(model)
    if getattr(model, "hf_quantizer", None) is not None:
        model.is_quantized = True  # type: ignore[assignment]
    return model


@advised("load the model's files with qzo.load, or leave this layer unquantized")
def _adopted(module: nn.Module) -> nn.Module | None:
    return next((layer for library in LIBRARIES if (layer := library.adopt(module)) is not None), None)


@advised("write the model with qzo.save, which needs no library's module")
def _released(module: nn.Module) -> nn.Module | None:
    return next((library.release(module) for library in LIBRARIES if isinstance(module, library.KINDS)), None)


def _each(model: nn.Module, make: Make) -> list[tuple[tuple[str, ...], nn.Module]]:
    """All paths of a module, and what `make` makes of it, where that is something."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    made = []
    for module, names in paths.items():
        with named(names[0]):
            new = make(module)
            if new is not None and "" in names:
                raise QzoError(f"a {type(module).__name__} cannot be replaced in place; pass the module that holds it")
        if new is not None:
            made.append((tuple(names), new))
    return made


def _replace(model: nn.Module, layers: list[tuple[tuple[str, ...], nn.Module]]) -> None:
    for names, new in layers:
        put(model, names, new)
