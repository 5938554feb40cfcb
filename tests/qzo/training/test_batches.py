"""Which examples make the batch of a step."""

import random

import pytest

from qzo.training.batches import WINDOW, batch_numbers


@pytest.mark.parametrize(("count", "batch_size"), [(6, 4), (7, 3), (3, 5), (64, 16), (1000, 16)])
def test_each_pass_sees_every_example_once_in_an_order_of_its_own(count, batch_size):
    lengths = random.Random(0).choices(range(5, 60), k=count)
    labels = random.Random(1).choices((0, 1, 2), k=count)
    steps = -(-6 * count // batch_size)
    numbers = [number for step in range(steps) for number in batch_numbers(lengths, labels, batch_size, 0, step)]
    passes = [numbers[first : first + count] for first in range(0, 6 * count, count)]
    assert all(sorted(seen) == list(range(count)) for seen in passes) and len(set(map(tuple, passes))) > 1


def test_a_batch_is_a_function_of_its_step_and_seed():
    lengths = [1] * 6
    numbers = [number for step in range(9) for number in batch_numbers(lengths, [0] * len(lengths), 4, 0, step)]
    assert (
        batch_numbers(lengths, [0] * len(lengths), 4, 0, 5) == numbers[20:24]
        and batch_numbers(lengths, [0] * len(lengths), 4, 1, 5) != numbers[20:24]
    )


def test_the_data_order_does_not_change_with_python():
    assert batch_numbers([1] * 10, [0] * 10, 10, 0, 0) == [9, 4, 8, 5, 7, 0, 1, 2, 3, 6]


def test_a_batch_holds_examples_of_similar_length_in_every_pass():
    rng = random.Random(1)
    lengths = [rng.randrange(5, 60) for _ in range(1000)]
    batches = [batch_numbers(lengths, [0] * len(lengths), 16, 0, step) for step in range(250)]
    padded = [16 * max(lengths[n] for n in batch) - sum(lengths[n] for n in batch) for batch in batches]
    share = sum(padded) / sum(lengths[n] for batch in batches for n in batch)
    by_chance = [rng.sample(range(1000), 16) for _ in range(250)]
    chance = sum(16 * max(lengths[n] for n in batch) for batch in by_chance) / (250 * 16 * sum(lengths) / 1000) - 1
    assert share < 0.1 < 0.6 < chance
    assert sorted(padded)[-20] < 200  # only where one pass ends and another begins are lengths mixed


def test_long_and_short_batches_are_not_in_order():
    lengths = list(range(WINDOW * 4))
    means = [sum(batch_numbers(lengths, [0] * len(lengths), 4, 0, step)) for step in range(WINDOW)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


@pytest.mark.parametrize("shares", [(1, 1), (4, 1), (5, 3, 1)])
def test_a_batch_holds_every_label_in_its_share(shares):
    rng = random.Random(2)
    labels = rng.choices(range(len(shares)), shares, k=992)
    lengths = [rng.randrange(5, 60) for _ in labels]
    wanted = [16 * labels.count(label) / len(labels) for label in range(len(shares))]
    for step in range(62):
        batch = [labels[number] for number in batch_numbers(lengths, labels, 16, 0, step)]
        assert all(abs(batch.count(label) - share) < 2 for label, share in enumerate(wanted))
