"""What a quantized layer's sizes must satisfy, checked before any work."""

from __future__ import annotations

from qzo.errors import QzoError

BITS = (2, 4, 8)


def check_bits(n_bits: int) -> None:
    """Raise QzoError unless codes of `n_bits` fill a 32-bit word without a remainder."""
    if n_bits not in BITS:
        raise QzoError(f"n_bits={n_bits} is not supported; choose 2, 4 or 8")


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


def check_layout(in_features: int, out_features: int, n_bits: int, group_size: int, common: int | None = None) -> int:
    """Return the group size that a GPTQ layer of this shape gets; raise QzoError where the layout cannot hold it.

    Codes of one column fill 32-bit words along K, zero points of one group along N: K and N must be multiples of
    32 / n_bits.
    """
    check_bits(n_bits)
    group_size = resolve_group_size(in_features, group_size, common)
    per_word = 32 // n_bits
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % per_word:
            raise QzoError(
                f"{name}={size} is not a multiple of {per_word}, the number of {n_bits}-bit codes in an int32; "
                "choose more bits"
            )
    return group_size


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
