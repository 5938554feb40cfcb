"""The ledger: every storage of one device, from birth to death, with the role it plays.

A `TorchDispatchMode` sees each operation's outputs; a storage that was not known before is born there and a weak
reference tells when it dies. Roles may be given at any time, also after the death (a gradient is known to be one only
when backward is over), so the peak is found afterwards by replaying the event list.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bench.ledger.accumulation import Accumulation
from bench.ledger.outputs import MetaOutputs

RESIDENT = ("weights", "quantization")  # roles given when the model is loaded; nothing overrides them
DEFAULT_ROLE = "temporaries"


@dataclass(slots=True, eq=False)
class Block:
    """One allocation: its size as the allocator counts it, and its role (None until somebody knows it).

    `died` is called when its tensor dies.
    """

    nbytes: int
    role: str | None = None
    region: int = 0
    weak: Any = None
    died: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One allocation (`sign` 1) or release (`sign` -1) in the phase that was current; 0 empties the cache."""

    sign: int
    block: Block
    phase: int


@dataclass
class Peak:
    """Where the highest allocation was and what it was made of; all in bytes."""

    nbytes: int = 0
    phase: str = ""
    roles: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Watch all storages on `device` while the mode is active.

    Args:
        device: device type that is counted ("cpu", "cuda", or "meta" for a simulated GPU).
        granularity: bytes to which each allocation is rounded up (512 for the CUDA caching allocator, 1 on the CPU).
        rules: operator -> function(ledger, func, args, kwargs) that runs instead of the operator; the simulator uses
            it for what a CUDA kernel allocates and the meta kernel does not, or the other way round.
    """

    def __init__(self, device: str = "cpu", granularity: int = 1, rules: dict[Any, Rule] | None = None) -> None:
        super().__init__()
        self.device = device
        self.granularity = granularity
        self.rules = rules or {}
        self.run: Callable[[Any, tuple, dict], Any] = MetaOutputs() if device == "meta" else _run
        self.accumulation = Accumulation()
        self.events: list[Event] = []
        self.phases: list[str] = ["load"]
        self._live: dict[int, Block] = {}
        self._phase = 0
        self._depth = 0
        self._region = 0
        self._hooks: list[Any] = []

    # ---- watching

    def __enter__(self) -> Ledger:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exc)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within a rule, which nobody watches: a piece of code whose operators are seen as any others."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = self.rules.get(func)
        in_place = self.accumulation.in_place(func, args, kwargs or {})
        out = self.run(func, args, kwargs or {}) if rule is None else rule(self, func, args, kwargs or {})
        if in_place:
            self._hand_over(args[0], out)
        # Random numbers drawn between forwards are the directions of zeroth-order methods; inside they are dropout.
        noise = not self._depth and torch.Tag.nondeterministic_seeded in func.tags
        if isinstance(out, Tensor):
            self.see(out, noise)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, Tensor):
                    self.see(item, noise)
                elif isinstance(item, (tuple, list)):
                    for tensor in item:
                        if isinstance(tensor, Tensor):
                            self.see(tensor, noise)
        return out

    def see(self, tensor: Tensor, noise: bool = False) -> Block | None:
        """Register the tensor's storage if it is new, on the watched device and not empty; return its block."""
        if tensor.device.type != self.device:
            return None
        storage = tensor.untyped_storage()
        block = self._live.get(storage._cdata)
        if block is None:
            nbytes = storage.nbytes()
            if not nbytes:
                return None
            block = self.allocate(nbytes)
            self.adopt(tensor, block)
        if noise and block.role is None:
            block.role = "noise"
        return block

    def adopt(self, tensor: Tensor, block: Block) -> None:
        """Let `block` live as long as the storage of `tensor`."""
        storage = tensor.untyped_storage()
        block.weak = weakref.ref(storage, partial(self._died, storage._cdata))
        self._live[storage._cdata] = block

    def _hand_over(self, old: Tensor, new: Tensor) -> None:
        """`new` is in the place of `old` from here on: to the allocator they are one."""
        block = self._live.pop(old.untyped_storage()._cdata, None)
        if block is None:
            return
        seen = self._live.get(new.untyped_storage()._cdata)  # by a rule, or a mode below this one
        if seen is not None:
            seen.weak = None
            del self.events[next(at for at in reversed(range(len(self.events))) if self.events[at].block is seen)]
        self.adopt(new, block)

    def _died(self, key: int, _: object) -> None:
        block = self._live.pop(key, None)
        if block is not None:
            if block.died is not None:
                block.died()
            self.release(block)

    def allocate(self, nbytes: int, role: str | None = None) -> Block:
        """Record an allocation that no tensor stands for (a kernel's workspace); `release` ends it."""
        rounded = -(-nbytes // self.granularity) * self.granularity
        block = Block(rounded, role, self._region if self._depth else 0)
        self.events.append(Event(1, block, self._phase))
        return block

    def release(self, block: Block) -> None:
        """Record that `block` was given back."""
        self.events.append(Event(-1, block, self._phase))

    def keep(self, block: Block) -> None:
        """Let `block` live until `end`, without a tensor."""
        self._live[-id(block)] = block

    def disown(self, block: Block) -> None:
        """`block` dies no longer with its tensor, and is kept no longer."""
        storage = block.weak and block.weak()
        self._live.pop(-id(block) if storage is None else storage._cdata, None)
        block.weak = None

    def end(self, block: Block) -> None:
        """Record that `block` was given back, even if its tensor is still there."""
        self.disown(block)
        self.release(block)

    def holds(self, block: Block) -> bool:
        """Whether `block` is alive, with a tensor or without."""
        storage = block.weak and block.weak()
        return self._live.get(-id(block) if storage is None else storage._cdata) is block

    def empty_cache(self) -> None:
        """Record torch.cuda.empty_cache(): what is free goes back to the GPU. Nothing to who counts what is alive."""
        self.events.append(Event(0, Block(0), self._phase))

    # ---- knowing the roles

    def assign(self, role: str, tensors: Iterable[Tensor | None]) -> None:
        """Give the storages of `tensors` a role, backdated to their birth; weights and quantization stay so."""
        for tensor in tensors:
            block = self.see(tensor) if tensor is not None else None
            if block is not None and block.role not in RESIDENT:
                block.role = role

    def enter(self, phase: str) -> None:
        """From here on events belong to `phase`."""
        if phase not in self.phases:
            self.phases.append(phase)
        self._phase = self.phases.index(phase)

    def _enter_module(self, *_: object) -> None:
        if not self._depth:
            self._region += 1
        self._depth += 1

    def _leave_module(self, *_: object) -> None:
        self._depth -= 1
        # What a forward (or a checkpointed layer's recomputation) leaves alive under autograd is kept for backward.
        if not self._depth and torch.is_grad_enabled():
            for block in self._live.values():
                if block.region == self._region and block.role is None:
                    block.role = "activations"

    # ---- reading

    def live_bytes(self) -> int:
        """Bytes alive now."""
        return sum(event.sign * event.block.nbytes for event in self.events)

    def peak(self, phases: Iterable[str] | None = None) -> Peak:
        """The highest sum of live bytes within `phases` (default: all), and its bytes by role."""
        wanted = set(range(len(self.phases))) if phases is None else {self.phases.index(name) for name in phases}
        highest, position, live = 0, -1, 0
        for index, event in enumerate(self.events):
            live += event.sign * event.block.nbytes
            if live > highest and event.phase in wanted:
                highest, position = live, index
        if position < 0:
            return Peak()
        roles: dict[str, int] = {}
        for event in self.events[: position + 1]:
            role = event.block.role or DEFAULT_ROLE
            roles[role] = roles.get(role, 0) + event.sign * event.block.nbytes
        return Peak(highest, self.phases[self.events[position].phase], {k: v for k, v in roles.items() if v})

    def peak_bytes(self) -> int:
        """Bytes at the highest point seen so far."""
        return self.peak().nbytes

    def at_peak(self) -> dict[str, int]:
        """Role -> bytes at the highest point seen so far."""
        return self.peak().roles

    def phase_peaks(self) -> dict[str, int]:
        """Phase -> highest live bytes while it was current, what was resident before it included."""
        peaks: dict[str, int] = {}
        live = 0
        for event in self.events:
            name = self.phases[event.phase]
            peaks[name] = max(peaks.get(name, live), live)
            live += event.sign * event.block.nbytes
            peaks[name] = max(peaks[name], live)
        return peaks


Rule = Callable[["Ledger", Any, tuple, dict], Any]


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(*args, **kwargs)
