"""The scales of a whole model moved by one launch for each kind of tensor, where kernels for a GPU are asked for.

A table says of each tensor where its numbers lie; one kernel (qzo/kernels/triton/moves.py) goes through all of them,
draws z of Philox where it is used, and does what QZO's operators do, to the bit. They need five launches for each chunk
of each tensor, which is 11,000 a step of a 7B model; this needs three. Extra memory: 88 bytes a tensor and 2 for each
thousand scales, for as long as the optimizer lives; z exists nowhere.

Not taken, and left to operators: z of PyTorch's generator, Adam, tensors that are on no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qzo.kernels import asked
from qzo.kernels.philox import COUNTED, Stream
from qzo.optim.guards.groups import TRAINABLE, Group
from qzo.optim.offsets import OFFSET_STATE

SIZE = 2048  # elements that a program moves


class Row(NamedTuple):
    """One tensor, all parts 1-D: `number` tells its z; offset, what it starts from, and momentum, where there are."""

    number: int
    live: Tensor
    master: Tensor
    offset: Tensor | None
    starts: tuple[Tensor, Tensor] | None
    momentum: Tensor | None

    def addresses(self) -> tuple[int, ...]:
        """Of live, master, offset, what these start from, momentum."""
        parts = (self.live, self.master, self.offset, *(self.starts or (None, None)), self.momentum)
        return tuple(0 if part is None else part.data_ptr() for part in parts)

    def placed_bytes(self) -> int:
        """Read and written by `Table.place`."""
        parts = (self.master, self.live, self.offset, *(self.starts or ()))
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def kind(self) -> tuple[Any, ...]:
        """What a kernel is compiled for, and where it runs."""
        return self.live.device, self.live.dtype, None if self.offset is None else self.offset.dtype


class Table:
    """Rows of one kind and of one parameter group."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.device, self.live, self.offset = rows[0].kind()
        self.rows = list(rows)  # held, so that no address is given to another tensor
        blocks = [-(-row.master.numel() // SIZE) for row in rows]
        numbers, first = [], 0
        for row, size in zip(rows, blocks, strict=True):
            offset_stride = 0 if row.offset is None else row.offset.stride(0)
            numbers.append((row.master.numel(), row.live.stride(0), offset_stride, row.number, first))
            first += size
        entries = [(*row.addresses(), *number) for row, number in zip(rows, numbers, strict=True)]
        self.entries = torch.tensor(entries, dtype=torch.int64, device="cpu").to(self.device)
        tensors = torch.arange(len(rows), dtype=torch.int32)
        self.tensor_of = tensors.repeat_interleave(torch.tensor(blocks)).to(self.device)

    @property
    def placed_bytes(self) -> int:
        """Masters, and what offsets start from, that are read, and live numbers that are written, to place scales."""
        return sum(row.placed_bytes() for row in self.rows)

    @property
    def kept_bytes(self) -> int:
        """Masters that an update writes, and momenta that it reads and writes."""
        return sum(row.master.nbytes + (0 if row.momentum is None else 2 * row.momentum.nbytes) for row in self.rows)

    def place(self, distance: float, relative: bool, stream: Stream, distribution: str | None) -> None:
        """Write s + distance z (with `relative` s + distance z s) to the live scales; s without a distribution."""
        if self.device.type != "meta":
            moved = self.entries, self.tensor_of, SIZE, self.live, self.offset
            asked.kernels("moves").place(*moved, distance, relative, stream, distribution)

    def update(self, factors: Sequence[float], group: Group, stream: Stream, distribution: str) -> None:
        """s = s + u of `qzo.optim.rules`, and live = s. factors: of z of each direction."""
        there = torch.tensor(factors, dtype=torch.float32, device="cpu").to(self.device, non_blocking=True)
        if self.device.type != "meta":
            options = -group["lr"], group.get("momentum") or 0.0, bool(group["relative"]), bool(group["nonnegative"])
            moved = self.entries, self.tensor_of, SIZE, self.live, self.offset
            asked.kernels("moves").update(*moved, there, *options, stream, distribution)


class Tables:
    """The tables of an optimizer, made anew where a tensor is not where it was."""

    def __init__(self) -> None:
        self._made: list[tuple[int, Table]] = []
        self._places: list[Any] = []

    def of(
        self, groups: Sequence[Group], states: dict[Tensor, Any], offsets: dict[Tensor, Tensor], noise: str
    ) -> list[tuple[int, Table]]:
        """Numbers of parameter groups, each with its tables; nothing where operators are to move the tensors.

        states: of each tensor, "master" and what else there is. offsets: those that follow a tensor.
        """
        if noise != "philox" or any(group.get("betas") for group in groups) or not _can_move(groups[0]["params"][0]):
            return []
        places = [_place(tensor, states[tensor], offsets) for group in groups for tensor in group["params"]]
        if places != self._places:
            self._made, self._places = _tables(groups, states, offsets), places
        return self._made


def _place(tensor: Tensor, state: dict[str, Any], offsets: dict[Tensor, Tensor]) -> tuple[int, ...]:
    """Where a tensor and what belongs to it lie; their owners hold them."""
    momentum = state.get("momentum")
    place = tensor.data_ptr(), state["master"].data_ptr(), 0 if momentum is None else momentum.data_ptr()
    if tensor not in offsets:
        return place
    starts = (state[key].data_ptr() for key in OFFSET_STATE)
    return *place, offsets[tensor].data_ptr(), *starts


def _tables(groups: Sequence[Group], states: dict[Tensor, Any], offsets: dict[Tensor, Tensor]) -> list[Any]:
    tensors = [tensor for group in groups for tensor in group["params"]]
    if not all(map(_can_move, [*tensors, *offsets.values()])):
        return []
    made, index = [], 0
    for number, group in enumerate(groups):
        rows: dict[Any, list[Row]] = {}
        for tensor in group["params"]:
            row = _row(index, tensor, states[tensor], offsets.get(tensor))
            rows.setdefault(row.kind(), []).append(row)
            index += 1
        made += [(number, Table(of)) for of in rows.values()]
    return made


def _can_move(tensor: Tensor) -> bool:
    is_plain = tensor.dtype in TRAINABLE and 0 < tensor.numel() < COUNTED and not isinstance(tensor, FakeTensor)
    return is_plain and asked.takes(tensor)


def _row(number: int, tensor: Tensor, state: dict[str, Any], offset: Tensor | None) -> Row:
    starts = None if offset is None else tuple(state[key].view(-1) for key in OFFSET_STATE)
    momentum = state["momentum"].view(-1) if "momentum" in state else None
    follows = None if offset is None else offset.detach().view(-1)
    return Row(number, tensor.detach().view(-1), state["master"].view(-1), follows, starts, momentum)
