"""Steps of QZO with z of Philox, which kernels for a GPU take in a few launches, on scales of several kinds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qzo import QZO

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, relative, several": {"momentum": 0.9, "relative": True, "directions": 3},
    "one-sided, signed": {"directions": 2, "estimator": "one-sided", "nonnegative": False},
    "rademacher": {"distribution": "rademacher"},
}


def scales(dtype: torch.dtype, with_offsets: bool = False, device: str = "cpu") -> tuple[dict[str, Tensor], list[Any]]:
    """Parameter groups of tensors that end within a block of a kernel, one of them strided, and its offsets."""
    generator = torch.Generator().manual_seed(0)

    def near(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).mul_(0.01).add_(0.005).to(device)

    blocks = torch.empty(40, 20, 10, dtype=dtype, device=device)
    live = {"a": near(700).to(dtype), "b": blocks[..., 0], "c": near(13, 100).to(dtype)}
    live["b"].copy_(near(40, 20))
    groups = [{"params": {"a": live["a"], "c": live["c"]}}, {"params": {"b": live["b"]}, "lr": 3e-6, "eps": 5e-4}]
    if with_offsets:
        live["m"] = blocks[..., 1].copy_(near(40, 20) - 0.01)
        live["b"][0, 0] = 0  # where the offset stays what it was
        groups[1]["offsets"] = {"b": live["m"]}
    return live, [group | {"params": list(group["params"].items())} for group in groups]


def trained(
    carrier: AbstractContextManager[Any], dtype: torch.dtype, with_offsets: bool, device: str = "cpu", **options: Any
) -> list[dict[str, Tensor]]:
    """Live tensors at each evaluation and at the end, and what the optimizer keeps."""
    live, groups = scales(dtype, with_offsets, device)
    seen: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        seen.append({name: tensor.clone() for name, tensor in live.items()})
        return sum((tensor.float() - 0.02).square().mean() for tensor in live.values())

    with carrier:
        optimizer = QZO(groups, noise="philox", lr=1e-5, seed=2**63 + 5, **options)
        for _ in range(2):
            optimizer.step(closure)
        optimizer.step(lambda: torch.nan)  # puts them back
        seen.append(live)
    return [*seen, optimizer.truth()]


def assert_same(found: list[list[dict[str, Tensor]]]) -> None:
    """The same bits at every evaluation, and at the end."""
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
