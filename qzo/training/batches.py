"""Which examples make the batch of a step: a function of the step, so that a resume needs no state."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

WINDOW = 16  # batches whose examples are sorted by length together


def batch_numbers(lengths: Sequence[int], labels: Sequence[int], batch_size: int, seed: int, step: int) -> list[int]:
    """Numbers of the examples that make the batch of step `step`, from 0: a function of its arguments.

    The examples are gone through again and again, each time in an order drawn from the seed and the pass. A batch holds

    - every label in its share, to within one or two: a label that is rare in one batch and frequent in the next moves
      the loss more than anything that a zeroth-order step could learn from it;
    - examples of similar length, so that little of it is padding.

    Only a batch that ends one pass and begins the next may fail in both.

    Args:
        lengths: tokens of each example.
        labels: label of each example.
        batch_size: examples a step.
        seed: of the order.
        step: which batch.
    """
    count, known = len(lengths), (tuple(lengths), tuple(labels))
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_order(*known, batch_size, seed, place // count)[place % count] for place in places]


@lru_cache(maxsize=4)
def _order(lengths: tuple[int, ...], labels: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Stratified at random, then in windows of 16 batches by length; the batches of a pass are shuffled."""
    rng = random.Random(f"qzo {seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order = _stratified(order, labels)
    begun = min(-epoch * len(order) % batch_size, len(order))  # examples that the last batch of the pass before lacks
    batches = []
    for start in range(begun, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lengths.__getitem__)
        window = _stratified(window, labels)
        batches += [window[first : first + batch_size] for first in range(0, len(window), batch_size)]
    ragged = batches.pop() if batches and len(batches[-1]) < batch_size else []
    rng.shuffle(batches)
    return [*order[:begun], *(number for batch in batches for number in batch), *ragged]


def _stratified(numbers: list[int], labels: Sequence[int]) -> list[int]:
    """The examples with their labels spread evenly; those of one label keep their order."""
    total = Counter(labels[number] for number in numbers)
    seen: Counter[int] = Counter()
    keys = {}
    for number in numbers:
        label = labels[number]
        keys[number] = (seen[label] + 0.5) / total[label]
        seen[label] += 1
    return sorted(numbers, key=keys.__getitem__)
