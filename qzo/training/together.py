"""`torchrun ... -m qzo train`: processes that take each step of one run together, and outlive the loss of one.

Every rank makes the same model and goes through the same loop; of a step it evaluates its share (`qzo.optim.ranks`),
and nothing but losses is sent. The run's folder is written by rank 0. The others keep a copy in a folder of their own,
which ends with them: with `--resume`, or when torchrun has started all ranks again (`--max-restarts`), rank 0 sends
them what it has, and all go on from there to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from qzo.errors import QzoError
from qzo.optim.ranks import Ranks, reaching
from qzo.regular import is_there
from qzo.training.run import RUN
from qzo.training.settings import ZEROTH_ORDER


def are_several() -> bool:
    """Whether torchrun, or who speaks as it does, started this process beside others."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def together(out: Path, resume: bool, method: str) -> Iterator[tuple[Path, bool, Ranks | None]]:
    """The folder of this rank's run, whether it goes on there, and the ranks; `out`, `resume`, None where it is alone.

    Ranks other than the first say nothing within, but for the error that ends them.

    Raises QzoError for a method that has gradients to exchange.
    """
    if not are_several():
        yield out, resume, None
        return
    if method not in ZEROTH_ORDER:
        raise QzoError(
            f"{method} has gradients to exchange, which qzo train does not; choose --method qzo or mezo, or train with "
            "the Trainer of transformers"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    with reaching():
        store, rank, size = next(rendezvous("env://"))
        # torchrun may keep the store, and with it the addresses of processes that are gone
        store = dist.PrefixStore(f"start-{restarts}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        ranks = Ranks("directions")
        with ExitStack() as stack:
            began = resume or restarts > 0
            there = _shared(out if ranks.rank == 0 and began and is_there(out / RUN) else None)
            if ranks.rank == 0:
                yield out, resume or bool(there), ranks
                return
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=f"qzo-rank-{ranks.rank}-"))) / "run"
            for name, content in there.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            yield folder, resume or bool(there), ranks
    finally:
        dist.destroy_process_group()


def _shared(folder: Path | None) -> dict[str, bytes]:
    """The files of rank 0's run, on all ranks; empty where it has none to go on with."""
    found: list[dict[str, bytes]] = [{}]
    if folder is not None:
        files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
        found = [{str(file.relative_to(folder)): file.read_bytes() for file in files}]
    with reaching():
        dist.broadcast_object_list(found, src=0)
    return found[0]
