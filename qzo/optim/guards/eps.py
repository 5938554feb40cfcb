"""How far a perturbation reaches, against the numbers that it perturbs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qzo.errors import QzoError

# θ ± eps z with z ~ N(0, 1): where eps is as large as a scale, one in six is perturbed to below 0, set to 0 there, and
# both losses are those of a wrecked model, whatever the direction. Of 4-bit models of 1B to 70B, and of SmolLM2-135M,
# the paper's 1e-3 is a fiftieth to a third; of 8-bit codes by the row (torchao int8) it is 2.3 times the median.
# Far below that both sides see another model already: of SmolLM2-135M, whose loss is 2.4 (3.0 in 4 bits), one side's is
# 3.0 to 5.0 at a tenth of the median and 6.3 to 8.8 at a fifth, in torchao int8 as in GPTQ of 4 and 8 bits. The paper's
# goes up to a third, and tiny models bear more, so that this is told and not refused.
STRONG = 0.15
SHARE = 0.01  # of the numbers of a group: a dead layer or expert alone does not count
AMOUNTS = "relative=True with eps=1e-2 and lr=1e-3 (--relative --eps 1e-2 --lr 1e-3)"
SAMPLE = 1024  # numbers of a tensor that its median is taken of


@torch.no_grad()
def check_eps(named: Iterable[tuple[str, Tensor]], eps: float, relative: bool) -> None:
    """Raise QzoError for an eps that is larger than the scales it perturbs, with what suits them.

    Args:
        named: (name, scales) of one parameter group; what is meta or fake or 0 throughout tells nothing.
        eps: of it.
        relative: whether it is a share of each number.

    Warns of one that is smaller, and yet so large that both losses are those of another model.
    """
    if relative:
        if eps > 1:
            raise QzoError(f"eps={eps:g} is more than each number itself, which it is a share of; choose e.g. 1e-2")
        return
    medians = _medians(named)
    small = [found for found in medians if eps > found[0]]
    if sum(numel for _, numel, _ in small) > SHARE * sum(numel for _, numel, _ in medians):
        _refuse(eps, *min(small), len(small), len(medians))
    size = _typical(medians)
    if eps > STRONG * size > 0:
        warnings.warn(
            f"eps={eps:g} is {eps / size:.0%} of the scales (median {size:.1e}): both losses of a step are those of "
            f"quite another model; perturb them by relative amounts, {AMOUNTS}, or give eps={size / 20:.0e}",
            stacklevel=5,
        )


@torch.no_grad()
def typical(named: Iterable[tuple[str, Tensor]]) -> float:
    """A size that half of the numbers reach, by the medians of their tensors; 0 where nothing is known of them."""
    return _typical(_medians(named))


def _typical(medians: list[tuple[float, int, str]]) -> float:
    half, passed = sum(numel for _, numel, _ in medians) / 2, 0
    for median, numel, _ in sorted(medians):
        passed += numel
        if passed >= half:
            return median
    return 0.0


def _medians(named: Iterable[tuple[str, Tensor]]) -> list[tuple[float, int, str]]:
    """(median, size, name) of each tensor that has one."""
    return [(median, tensor.numel(), name) for name, tensor in named if (median := _median(tensor)) > 0]


def _refuse(eps: float, median: float, _: int, name: str, count: int, total: int) -> None:
    raise QzoError(
        f"eps={eps:g} is larger than the scales of {count} of {total} tensors, e.g. {name} with a median of "
        f"{median:.1e}, and would wipe them out; perturb them by relative amounts, {AMOUNTS}, or give "
        f"eps={median / 10:.0e}"
    )


def _median(tensor: Tensor) -> float:
    """Of the absolute values of some of its numbers that are not 0; 0 where there is none."""
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.numel():
        return 0.0
    flat = tensor.detach().view(-1)
    numbers = flat[:: max(1, flat.numel() // SAMPLE)].float().abs()
    numbers = numbers[numbers > 0]
    return float(numbers.median()) if len(numbers) else 0.0
