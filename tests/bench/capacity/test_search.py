"""The largest size that fits: proven on both sides, with few measurements, whatever shape the cost has."""

import pytest

from bench.capacity.search import largest


class Cost:
    """A cost that counts how often it is asked, and never twice for the same size."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, n: int) -> int:
        assert n not in self.asked
        self.asked.append(n)
        return self.function(n)


SHAPES = {
    "line": lambda n: 1000 + 37 * n,
    "stairs": lambda n: 1000 + 37 * n // 500 * 500,
    "flat, then a line": lambda n: max(5000, 90 * n),
    "parabola": lambda n: 100 + 3 * n + n * n // 50,
    "steep": lambda n: 2**n,
}


@pytest.mark.parametrize("highest", [None, 300, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [1_037, 5_000, 5_001, 20_000, 77_777])
def test_the_answer_fits_and_the_next_size_does_not(shape, limit, highest):
    cost = Cost(SHAPES[shape])
    found = largest(cost, limit, 1, highest)
    every = [n for n in range(1, (highest or 10_000) + 1) if n <= 60 or shape != "steep"]
    fitting = [n for n in every if SHAPES[shape](n) <= limit]
    assert found == (max(fitting) if fitting else None)
    if found is not None:
        assert found in cost.asked
        assert found == highest or found + 1 in cost.asked


def test_a_line_takes_four_measurements_and_a_parabola_few():
    cost = Cost(SHAPES["line"])
    assert largest(cost, 77_777, 1) == 2075  # (77,777 - 1,000) // 37
    assert len(cost.asked) == 4
    cost = Cost(SHAPES["parabola"])
    largest(cost, 77_777, 1, 100_000)
    assert len(cost.asked) <= 16


def test_the_ends_are_answers_too():
    assert largest(lambda n: 10, 9, 1) is None
    assert largest(lambda n: 10, 10, 1, 1) == 1
    assert largest(lambda n: 10, 10, 1, 50) == 50
    assert largest(lambda n: 10 * n, 10, 1, 50) == 1
