"""PyTorch's own random numbers during a step: dropout must draw the same masks at both sides of a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from qzo.optim.noise import mix_seed

MASKS = 2**63  # a word in the place of a tensor's index, so that no z is drawn from the same stream


@contextmanager
def same_masks(seed: int, step: int) -> Iterator[Callable[[], None]]:
    """Within, each call of what is yielded starts PyTorch's default generators anew, from (seed, step) alone.

    So all evaluations of a step draw the same numbers, those of another step others, and a resumed run the same again.
    Afterwards the generators, of the CPU and of every GPU in use, are where they were: a step takes nothing of the
    caller's stream. Python's and NumPy's are left alone.
    """
    begin = mix_seed(seed, step, MASKS)
    gpus = torch.cuda.default_generators if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    kept, states = torch.default_generator.clone_state(), [generator.get_state() for generator in gpus]

    def restart() -> None:
        for generator in (torch.default_generator, *gpus):
            generator.manual_seed(begin)

    try:
        yield restart
    finally:
        torch.default_generator.set_state(kept.get_state())
        for generator, state in zip(gpus, states, strict=True):
            generator.set_state(state)
