"""Activations that wait in the host's memory between forward and backward, as TRL's `activation_offloading` has them.

Every tensor that autograd saves goes to the host, unless it is small, a parameter, the input of the head, or of the
same storage as one that is on its way. A tensor stays on the device until `IN_FLIGHT` later ones were saved, since its
copy runs beside the computation; in backward it comes back when it is asked for, and goes when the next node is done.

Source: TRL 1.16, models/activation_offloading.py. Tensors that come back are taken from the pool of another stream,
which the simulated allocator does not tell apart: what is alive is exact, what is reserved is at the least so much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bench.methods.optimizers.in_place import has_data

LEAST = 1024  # bytes of a tensor that goes (min_offload_size)
IN_FLIGHT = 5  # saved tensors after which a copy is taken to be done (max_fwd_stash_size)


@dataclass
class Away:
    """A tensor on the host: its bytes, None where it has no data, and how it was laid out."""

    data: np.ndarray | None
    numbers: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def back(self) -> Tensor:
        """The tensor on its device again."""
        flat = torch.empty(self.numbers, dtype=self.dtype, device=self.device)
        if self.data is not None:
            flat.view(torch.uint8).copy_(torch.from_numpy(self.data))
        return flat.as_strided(self.shape, self.stride, self.offset)


@dataclass
class Offloading(saved_tensors_hooks):
    """The context of a micro-batch's forward and backward.

    Args:
        parameters: storages that stay.
        empty_cache: called at the start, as TRL does where bitsandbytes is imported; None where it is not.
    """

    parameters: set[int]
    empty_cache: Callable[[], None] | None = None
    tracked: dict[int, Tensor | Away] = field(default_factory=dict)
    leaving: dict[int, Tensor] = field(default_factory=dict)
    returned: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[tuple[int, int, torch.dtype], int] = field(default_factory=dict)
    last: int = 0
    node: Any = None
    in_backward: bool = False

    def __post_init__(self) -> None:
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        for items in (self.tracked, self.leaving, self.returned, self.keys):
            items.clear()
        self.last, self.in_backward = 0, False
        if self.empty_cache:
            self.empty_cache()
        super().__enter__()

    def __exit__(self, *exc: object) -> None:
        self.returned.clear()
        self.leaving.clear()
        super().__exit__(*exc)

    def _pack(self, tensor: Tensor) -> int:
        self.last += 1
        key = _place(tensor), int(tensor.storage_offset()), tensor.dtype
        if key in self.keys or not self._goes(tensor):
            self.tracked[self.last] = tensor
            return self.last
        broadcast = 0 in tensor.stride()
        if not broadcast and tensor.storage_offset():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        elif not broadcast:
            tensor = tensor.contiguous()
        for earlier in [number for number in self.leaving if number <= self.last - IN_FLIGHT]:
            self._left(earlier)
        self.tracked[self.last] = _away(tensor, broadcast)
        self.leaving[self.last] = tensor
        self.keys[key] = self.last
        return self.last

    def _goes(self, tensor: Tensor) -> bool:
        large = tensor.element_size() * tensor.nelement() >= LEAST
        return large and not isinstance(tensor, nn.Parameter) and _place(tensor) not in self.parameters

    def _left(self, number: int) -> None:
        """The copy is done; the tensor is no longer held."""
        del self.leaving[number]
        for key in [key for key, owner in self.keys.items() if owner == number]:
            del self.keys[key]

    def _unpack(self, number: int) -> Tensor:
        if not self.in_backward:
            self.in_backward, self.node = True, None
            torch.autograd.Variable._execution_engine.queue_callback(self.returned.clear)
        tensor = self.tracked.pop(number)
        if not isinstance(tensor, Away):
            return tensor
        before: list[int] = []
        node = torch._C._current_autograd_node()
        if node != self.node:
            self.node, before = node, list(self.returned)
        if number in self.leaving:
            found = self.leaving[number]
        else:
            found = self.returned[number] = tensor.back()
        references = _references(found)

        def done(*_: object) -> None:
            """The node has run: what it used may go with the next one, unless it is used further."""
            if number in self.returned and _references(self.returned[number]) > references:
                del self.returned[number]
            for earlier in list(self.leaving):
                self._left(earlier)
            for earlier in before:
                self.returned.pop(earlier, None)

        node.register_hook(done)
        return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _references(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _away(tensor: Tensor, broadcast: bool) -> Away:
    size = tensor.untyped_storage().size() // tensor.element_size() if broadcast else tensor.nelement()
    data = None
    if has_data(tensor):
        whole = torch.as_strided(tensor.detach(), (size,), (1,), 0 if broadcast else tensor.storage_offset())
        data = whole.view(torch.uint8).cpu().numpy().copy()
    offset = int(tensor.storage_offset()) if broadcast else 0
    return Away(data, size, tensor.dtype, tensor.device, tensor.shape, tensor.stride(), offset)


def offloading_of(model: nn.Module, empty_cache: Callable[[], None] | None = None) -> Offloading:
    """The context for a model, whose head's input is kept on the device from here on."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = base.get_output_embeddings()
    if head is not None:
        plain = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        head.register_forward_pre_hook(lambda *_: plain.__enter__())
        head.register_forward_hook(lambda *_: plain.__exit__(), always_call=True)
    return Offloading({_place(parameter) for parameter in model.parameters()}, empty_cache)
