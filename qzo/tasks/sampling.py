"""Training, validation and test examples drawn by seed, with no text in two of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qzo.errors import QzoError
from qzo.tasks.example import Example

Pools = dict[str, list[Example]]


def draw(source: Pools, sizes: dict[str, int], seed: int) -> Pools:
    """Draw `sizes` examples for each split, fewer where the source has fewer.

    A split that the source does not have is cut from its "train": texts, each with all its examples, are dealt out
    at random in the proportion of the sizes. A text of another split never stays in "train". Examples of one group are
    taken or left together, so a split can end a few examples short.

    Args:
        source: "train", and "test" where there is one, each with all its examples.
        sizes: examples wanted of "train", "validation" and "test".
        seed: gives the same splits each time, whatever they are used for.

    Raises:
        QzoError: a size below 1, or a split that stays empty.
    """
    for split, size in sizes.items():
        if size < 1:
            raise QzoError(f"{split}={size}: at least 1 example is needed; give more")
    taken = {example.key() for split, found in source.items() if split != "train" for example in found}
    rest = [example for example in source["train"] if example.key() not in taken]
    if source["train"] and not rest:
        count = len(source["train"])
        raise QzoError(
            f"all {count:,} training examples also stand in another split, so none is left to train on; give other "
            "rows for the splits"
        )
    cut = {split: size for split, size in sizes.items() if split == "train" or split not in source}
    pools = {**source, **_deal(rest, cut, random.Random(f"{seed}/deal"))}
    drawn = {split: _take(pools[split], size, random.Random(f"{seed}/{split}")) for split, size in sizes.items()}
    for split, found in drawn.items():
        if not found:
            raise QzoError(
                f"the {split} split is empty: its source has {len(pools[split])} examples that it can use; add some, "
                "or ask for fewer in the other splits"
            )
    return drawn


def _deal(examples: Sequence[Example], shares: dict[str, int], rng: random.Random) -> Pools:
    """Deal the texts out in random order, each to the split that is furthest behind its share."""
    texts: dict[str, list[Example]] = {}
    for example in examples:
        texts.setdefault(example.key(), []).append(example)
    order = list(texts)
    rng.shuffle(order)
    pools: Pools = {split: [] for split in shares}
    for text in order:
        behind = min(shares, key=lambda split: len(pools[split]) / shares[split])
        pools[behind] += texts[text]
    return pools


def _take(examples: Sequence[Example], size: int, rng: random.Random) -> list[Example]:
    """At most `size` examples in random order, a group whole or not at all."""
    groups: dict[object, list[Example]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(example.group or number, []).append(example)
    order = list(groups.values())
    rng.shuffle(order)
    taken: list[Example] = []
    for group in order:
        if len(taken) + len(group) <= size:
            taken += group
        if len(taken) == size:
            break
    return taken
