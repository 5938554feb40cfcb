"""What an operator returns on tensors without data, worked out once for each kind of arguments.

Most meta kernels are Python (broadcasting, type promotion, the order of strides) and cost more than all the rest of a
simulation. Their result depends on nothing but the arguments' shapes, strides and dtypes, so the second call of a kind
is answered with new empty tensors of the shapes that the first one gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides, dtype
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Unknown(Exception):
    """An argument of a kind that is not remembered."""


class MetaOutputs:
    """Run operators on device meta; answer those that return new tensors of their own from memory.

    Never from memory: operators that write into an argument or return a view, whether their schema says so or their
    first result shows it, and calls with a tensor on another device, whose value may decide.
    """

    def __init__(self) -> None:
        self._layouts: dict[Any, Any] = {}
        self._makes_new: dict[Any, bool] = {}

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        makes_new = self._makes_new.get(func)
        if makes_new is None:
            makes_new = self._makes_new[func] = _makes_new(func)
        if not makes_new:
            return func(*args, **kwargs)
        try:
            key = (func, _kind(args), tuple([(name, _kind(value)) for name, value in kwargs.items()]))
        except _Unknown:
            return func(*args, **kwargs)
        layouts = self._layouts.get(key)
        if layouts is not None:
            return _empty(layouts)
        out = func(*args, **kwargs)
        layouts = _layouts(out, {_storage(tensor) for tensor in _tensors((args, tuple(kwargs.values())))})
        if layouts is None:
            self._makes_new[func] = False
        else:
            self._layouts[key] = layouts
        return out


def _makes_new(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and all(item.alias_info is None for item in schema.returns)


def _kind(argument: Any) -> Any:
    """All of an argument that a meta kernel can see, as something hashable; numbers with their type, as 1 == 1.0."""
    if isinstance(argument, Tensor):
        if not argument.is_meta:
            raise _Unknown
        return argument.shape, argument.stride(), argument.dtype
    if isinstance(argument, (tuple, list)):
        return tuple([_kind(item) for item in argument])
    if isinstance(argument, PLAIN):
        return type(argument), argument
    raise _Unknown


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for item in arguments:
            yield from _tensors(item)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layouts(out: Any, taken: set[int]) -> Any:
    """The layouts of new tensors that fill storages of their own, in the same nesting; None if `out` is not that."""
    if isinstance(out, (tuple, list)):
        layouts = [_layouts(item, taken) for item in out]
        return None if None in layouts else (type(out), layouts)
    if not isinstance(out, Tensor) or not out.is_meta or out.storage_offset() or _storage(out) in taken:
        return None
    taken.add(_storage(out))
    layout = (out.shape, out.stride(), out.dtype)
    return layout if _empty(layout).untyped_storage().nbytes() == out.untyped_storage().nbytes() else None


def _empty(layouts: Any) -> Any:
    if len(layouts) == 2:
        container, items = layouts
        return container([_empty(item) for item in items])
    shape, strides, dtype = layouts
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
