"""What a quantized layer's sizes must satisfy, checked before any work."""

from __future__ import annotations

import math

from qzo.errors import QzoError

BITS = (2, 3, 4, 8)


def check_bits(n_bits: int) -> None:
    """Raise QzoError unless there is a layout for codes of `n_bits`."""
    if n_bits not in BITS:
        raise QzoError(f"n_bits={n_bits} is not supported; choose 2, 3, 4 or 8")


def block_of(n_bits: int) -> tuple[int, int]:
    """Codes and 32-bit words of the smallest block that codes of `n_bits` fill: (8, 1) for 4 bits, (32, 3) for 3."""
    common = math.gcd(n_bits, 32)
    return 32 // common, n_bits // common


def resolve_group_size(in_features: int, group_size: int, common: int | None = None) -> int:
    """Weights that share a scale, `-1` meaning the whole row; raise QzoError unless it divides `in_features`.

    `common` is what the group sizes that the error proposes must divide, e.g. a divisor of every layer's width.
    """
    if group_size == -1:
        return in_features
    if group_size < 1:
        raise QzoError(f"group_size={group_size} is not positive; choose a divisor of in_features, or -1 for the row")
    if in_features % group_size:
        choices = _divisors(common or in_features)
        nearest = min(choices, key=lambda divisor: (abs(divisor - group_size), -divisor))
        raise QzoError(
            f"in_features={in_features} is not divisible by group_size={group_size}; choose {nearest}, or -1"
        )
    return group_size


def check_layout(
    in_features: int,
    out_features: int,
    n_bits: int,
    group_size: int,
    common: int | None = None,
    short_group: bool = False,
) -> int:
    """Return the group size that a GPTQ layer of this shape gets; raise QzoError where the layout cannot hold it.

    `short_group` allows a last group of fewer weights, as checkpoints of AutoGPTQ have them. Codes of one column fill
    32-bit words along K, zero points of one group along N: K and N must be multiples of 32 / n_bits, with 3 bits of 32,
    whose codes fill three words.
    """
    check_bits(n_bits)
    if not short_group or group_size < 1:
        group_size = resolve_group_size(in_features, group_size, common)
    count, words = block_of(n_bits)
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % count:
            place = "an int32" if words == 1 else f"{words} int32"
            raise QzoError(
                f"{name}={size} is not a multiple of {count}, the number of {n_bits}-bit codes in {place}; "
                f"choose {'more' if words == 1 else 'other'} bits"
            )
    return group_size


def _divisors(number: int) -> list[int]:
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return [*low, *(number // divisor for divisor in reversed(low) if divisor * divisor < number)]
