"""What one evaluation of a loss shows of the model: the loss, what the model gives out, and which layers are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qzo.optim.randomness import same_masks

MARGIN = 8  # times the difference between two evaluations of the same model
CHUNK = 2**20  # numbers of an output that are read at a time


class Output(NamedTuple):
    """One tensor that the model gave out: a weighted sum of its finite numbers, and how many are not finite."""

    total: float
    lost: int


@dataclass
class Evidence:
    """One evaluation. `outputs`: of the outermost calls of modules, by module and position; the last call counts."""

    loss: float = math.nan
    outputs: dict[tuple[str, int], Output] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)  # of the paths asked for, those called with data

    @property
    def broken(self) -> bool:
        """Whether something is not finite in what the model gave out."""
        return any(output.lost for output in self.outputs.values())


def evidence(model: nn.Module, loss: Callable[[], Any], paths: Iterable[str]) -> Evidence:
    """Evaluate the loss once and watch the model; `paths` are of layers that are to be seen at work."""
    seen, called = Evidence(), set[str]()
    with same_masks(0, 0) as restart, _watched(model, seen, set(paths), called):
        restart()
        seen.loss = float(loss())
    seen.called = sorted(called)
    return seen


def moved(before: Evidence, again: Evidence, after: Evidence) -> bool:
    """Whether `after` differs by more than two evaluations of the same model do; what is not finite tells nothing."""
    numbers = [(before.loss, again.loss, after.loss)]
    for key, first in before.outputs.items():
        second, third = again.outputs.get(key), after.outputs.get(key)
        if second and third and first.lost == second.lost == third.lost:
            numbers.append((first.total, second.total, third.total))
    return any(
        math.isfinite(first + second + third) and abs(third - first) > MARGIN * abs(second - first)
        for first, second, third in numbers
    )


@contextmanager
def _watched(model: nn.Module, seen: Evidence, paths: set[str], called: set[str]) -> Iterator[None]:
    """Within, calls of the model's modules are noted."""
    depth: list[str] = []
    handles = []

    def watch(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            depth.append(path)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            depth.pop()
            if path in paths and (not isinstance(output, Tensor) or output.numel()):
                called.add(path)
            if not depth:
                seen.outputs |= {(path, number): _read(tensor) for number, tensor in enumerate(_tensors(output))}

        return enter, leave

    for path, module in model.named_modules():
        enter, leave = watch(path)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors, a loss not among them, of what a module returned."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim()]


def _read(tensor: Tensor) -> Output:
    weights = torch.rand(min(CHUNK, tensor.numel()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, total, lost = weights.to(tensor.device), 0.0, 0
    for chunk in tensor.detach().reshape(-1).split(CHUNK):
        finite = chunk.isfinite()
        lost += chunk.numel() - int(finite.sum())
        total += float(chunk.double().masked_fill_(~finite, 0).mul_(weights[: chunk.numel()]).sum())
    return Output(total, lost)
