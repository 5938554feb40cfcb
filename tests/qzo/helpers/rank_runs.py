"""Steps that several processes take together, on a tiny quantized model; each returns what it came to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

import qzo
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear

MICRO_BATCHES, STEPS = 5, 4


def run(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returned, or the one line of its QzoError, in each of `size` processes of a group."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_begin, (size, work, folder), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _begin(rank: int, size: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        found = work(rank)
    except QzoError as error:
        found = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def model() -> nn.Sequential:
    """Two quantized layers."""
    torch.manual_seed(0)
    layers = (QuantLinear.from_weight(torch.randn(32, 32).mul_(0.1).bfloat16(), None, 4, 32) for _ in range(2))
    return nn.Sequential(*layers)


def closures(net: nn.Module, data: Tensor) -> list[Callable[[], Tensor]]:
    """One for each micro-batch, of sizes that differ."""
    parts = torch.arange(len(data)).tensor_split([3, 4, 9, 11])
    return [lambda part=part: (net(data[part]).float() - 1).square().sum() / len(data) for part in parts]


def optimizer(net: nn.Module, name: str = "qzo", **options: Any) -> qzo.QZO | qzo.MeZO:
    """QZO on its scales, or MeZO on all of it in bf16."""
    if name == "mezo":
        return qzo.MeZO({"w": net[0].scales}, lr=1e-6, eps=1e-4, **options)  # type: ignore[index]
    return qzo.QZO(qzo.scales(net), lr=1e-6, eps=1e-4, **options)


def trained(ranks: qzo.Ranks | None, name: str = "qzo", **options: Any) -> tuple[dict[str, Tensor], list[float], int]:
    """Masters, losses and the bytes that this rank sent in a step."""
    net = model()
    trainer = optimizer(net, name, ranks=ranks, **options)
    data = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    losses = [trainer.step(closures(net, data)) for _ in range(STEPS)]
    truth = {key: value.clone() for key, value in trainer.truth().items()}
    return truth, losses, 0 if ranks is None else ranks.sent // STEPS
