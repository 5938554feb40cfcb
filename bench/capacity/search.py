"""The largest size that fits, with few measurements of a cost that grows almost in a straight line."""

from __future__ import annotations

import math
from collections.abc import Callable

PROBE = 8  # the second size to measure is so many times the first
REACH = 1024  # and no later one is more than so many times the largest known to fit
HALVE_EVERY = 4  # each fourth guess halves the bracket, so a cost that is no line costs a logarithm at most


def largest(cost: Callable[[int], int], limit: int, lowest: int, highest: int | None = None) -> int | None:
    """The largest n in lowest..highest with cost(n) <= limit; None if not even `lowest` fits.

    What is returned has been measured to fit, and n + 1 not to, unless n is `highest`. Where the cost falls somewhere
    (an allocator's reserve can), n is one such border. A guess is where the line through the two measured sizes that
    lie nearest to the limit crosses it.
    """
    known = {lowest: cost(lowest)}
    if known[lowest] > limit:
        return None
    low, high = lowest, None
    if highest is not None and highest > lowest:
        known[highest] = cost(highest)
        high = highest
    if highest == lowest or (high is not None and known[high] <= limit):
        return highest
    while high is None or high - low > 1:
        guess = _guess(known, limit, low, high)
        known[guess] = cost(guess)
        if known[guess] <= limit:
            low = guess
        else:
            high = guess
    return low


def _guess(known: dict[int, int], limit: int, low: int, high: int | None) -> int:
    """A size strictly between low and high (None: no upper end yet)."""
    if len(known) == 1:
        return low * PROBE
    end = high or low * REACH
    middle = math.isqrt(low * end) if end > 4 * low else (low + end) // 2
    (n, at_n), (m, at_m) = sorted(known.items(), key=lambda item: abs(item[1] - limit))[:2]
    if at_n == at_m or (high is not None and len(known) % HALVE_EVERY == 0):
        return middle
    crossing = n + (limit - at_n) * (m - n) // (at_m - at_n)
    return min(max(crossing, low + 1), end - 1) if low <= crossing <= end else middle
