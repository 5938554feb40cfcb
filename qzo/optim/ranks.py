"""A step shared by processes: each evaluates a part of it, one all-reduce of its losses, the same bits on all of them.

Whatever the model, all that a step needs to know of the others is a few losses. Masters, z and the update are the same
everywhere, so nothing else is sent: 8 bytes for each loss, and 16.

    share       what is evaluated where, of N ranks
    batch       closure k, of those that `step` is given, by rank k mod N: give all ranks the same closures, one for
                each micro-batch
    directions  evaluation e of the step (a side of a direction, or θ itself) by rank e mod N, with all its closures

A loss that another rank evaluates is 0 in what a rank adds to the sum, so the sum has every loss exactly, whatever the
order of summation; and each rank adds up all of them in the order of the closures. A run therefore ends with the same
bits for any N, provided that ranks compute alike: the same kind of machine, threads and versions, and no dropout.

Where a closure raises, all ranks put their tensors back and raise, so that nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qzo.errors import QzoError

SHARES = ("batch", "directions")
CHUNK = 2**20  # numbers of a fingerprint at a time
Losses = list[list["Tensor | float | None"]]


class Ranks:
    """The processes of `torch.distributed` that take each step together, for `ranks=` of QZO and MeZO.

    Call `torch.distributed.init_process_group` before, or start the program with `torchrun` and do so. Make the same
    model and the same optimizer on each rank; keep a journal on one of them.

    Args:
        share: "batch" or "directions", see above.
        check_every: steps between comparisons of all masters; before the first step they are compared in any case, with
            the seed, the options and the versions.
        group: of `torch.distributed`; None, all processes.

    `sent` counts the bytes that this rank put into sums of losses. Raises QzoError where no process group was begun.
    """

    def __init__(self, share: str = "batch", check_every: int = 100, group: Any = None) -> None:
        if share not in SHARES:
            raise QzoError(f'share="{share}" is not known; choose "batch" or "directions"')
        if not isinstance(check_every, int) or check_every < 1:
            raise QzoError(f"check_every={check_every!r} is not a positive whole number; choose e.g. 100")
        if not (dist.is_available() and dist.is_initialized()):
            raise QzoError(
                "there is no process group; start the program with torchrun and call "
                "torch.distributed.init_process_group() before qzo.Ranks()"
            )
        self.share, self.check_every, self.group = share, check_every, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0

    def has(self, evaluation: int, closure: int) -> bool:
        """Whether this rank evaluates a closure at the evaluation of a step with this number."""
        return (closure if self.share == "batch" else evaluation) % self.size == self.rank

    def read(self, losses: Losses) -> list[float]:
        """The sum of the closures' losses at each evaluation; None stands for those that others evaluate.

        Raises QzoError where a closure of another rank raised, and where the others cannot be reached.
        """
        flat = [loss for part in losses for loss in part]
        there = [loss for loss in flat if isinstance(loss, Tensor)]
        values = torch.zeros(len(flat) + 2, dtype=torch.float64, device=there[0].device if there else self._device())
        for place, loss in enumerate(flat):
            if loss is not None:
                values[place] = loss
        *found, failed, who = self._sum(values).tolist()
        if failed:
            whose = f"of rank {int(who)}" if failed == 1 else f"of {int(failed)} ranks"
            raise QzoError(f"the closure {whose} raised; see what it tells, this step was left out on all ranks")
        numbers = iter(found)
        return [sum(next(numbers) for _ in part) for part in losses]

    def give_up(self, count: int) -> None:
        """Tell the others, who wait for the losses of `count` closures, that one of this rank's raised."""
        values = torch.zeros(count + 2, dtype=torch.float64, device=self._device())
        values[-2], values[-1] = 1, self.rank
        self._sum(values)

    def compare(self, facts: dict[str, Any]) -> None:
        """Raise QzoError that names the first rank of which one of these differs from those of rank 0."""
        every: list[Any] = [None] * self.size
        with reaching():
            dist.all_gather_object(every, facts, group=self.group)
        for rank, other in enumerate(every):
            for name, value in every[0].items():
                if other.get(name) != value:
                    raise QzoError(
                        f"rank {rank} differs in its {name} ({other.get(name)}, on rank 0 {value}); give all ranks the "
                        "same model, seed and options, and start again from rank 0's last snapshot or journal"
                    )

    def _sum(self, values: Tensor) -> Tensor:
        self.sent += values.nbytes
        values = values.to(self._device())
        with reaching():
            dist.all_reduce(values, group=self.group)
        return values

    def _device(self) -> torch.device:
        backend = str(dist.get_backend(self.group))
        return torch.device("cpu") if "gloo" in backend else torch.device("cuda", torch.cuda.current_device())


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """64 bits of the bits of fp32, fp16 or bf16 tensors, which another order of the numbers changes too.

    Extra memory: 16 MiB where they are.
    """
    total = 0
    for tensor in tensors:
        bits = tensor.detach().view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
        for start in range(0, len(bits), CHUNK):
            part = bits[start : start + CHUNK].long()
            part *= torch.arange(start + 1, start + 1 + len(part), device=part.device)
            total = (total * 6364136223846793005 + int(part.sum()) + 1) % 2**64
    return total


@contextmanager
def reaching() -> Iterator[None]:
    """Turn what a lost process gives into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of every backend
        reason = str(error).strip().split("\n")[0]
        raise QzoError(
            f"the other ranks cannot be reached ({reason}); start all of them again, torchrun --max-restarts does so"
        ) from error
