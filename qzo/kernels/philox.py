"""Random numbers that are the same on every device: Philox 4x32-10, its words as counted here, and z from their bits.

z of an element is a function of (seed, step, tensor, direction, element), and of nothing else: not of the
device, of threads, or of how many elements are drawn at a time. All of it is integers, until the last step, which is
exact in any floating point dtype. This is the one definition; whatever draws z follows it to the bit.

    bits m      what of the stream makes an element: 1 for "rademacher", 16 for "binomial"
    z           (popcount of its m bits - m / 2) * 2 / sqrt(m):  2 b - 1 = ±1, and (popcount - 8) / 2
    block       (c0, c1, c2, c3), (k0, k1) -> Philox 4x32-10 -> four words of 32 bits (Salmon et al., 2011)
                c0 number of the block   c1 index of the tensor   c2 direction   c3 step
                k0 low half of the seed (taken modulo 2**64)      k1 high half
    tile        LANES = 16 blocks in a row, which make 16 * E elements in a row, E = 128 / m: 2048, and 128
    element e   block 16 * (e // (16 E)) + e % 16;   part p = (e // 16) % E of its 128 bits, counted from the lowest
                bit of the first word: word p m // 32, its bits p m % 32 ... p m % 32 + m - 1

So 16 neighbouring elements take the same part of 16 neighbouring blocks: a vector of blocks gives runs of z, which are
stored as they are. Any range begins with the tile that its first element is in. Block numbers have 32 bits: a tensor
may have 2**35 elements.

"binomial" is Binomial(16, 1/2), centred and of variance 1: seventeen values -4, -3.5, ..., 4, of which 0 has a chance
of 19.6 % and each end 1 in 65,536; kurtosis 3 - 2/16 = 2.875 (normal: 3, Rademacher: 1), no tail beyond 4 (of a normal
number 1 in 16,000 is there). Sixteen bits, so that half the standard deviation is 1: z is exact in bf16 and fp16 too.

Here it is by PyTorch's operators, in int64 with masks, on any device; on a CPU compiled code does the same, 0.15 ns an
element for "rademacher" and 0.4 for "binomial", where operators need 10 and 20 and PyTorch's normal_ 3.5. On a GPU
operators launch some 170 kernels for up to 2**18 elements; the kernel in Triton, where it is asked for, is one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qzo.errors import QzoError
from qzo.kernels import asked, native

BITS = {"rademacher": 1, "binomial": 16}  # of the stream that make an element
LANES = 16
BLOCK_BITS = 128
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by, a round
ROUNDS = 10
WORD, SEED = 2**32 - 1, 2**64 - 1
PIECE = 2**18  # elements at a time: 2.5 MiB of words for "binomial", 1 MiB of z where a range ends within a tile
COUNTED = 2**31  # elements, in int32, by kernels for a GPU
LEAST_DRAWN = 2**16  # elements, from which on it is worth to wake the other threads


class Stream(NamedTuple):
    """Which z: of the tensor with this index, in a step, along one of its directions."""

    seed: int
    step: int
    tensor: int
    direction: int

    def key(self) -> tuple[int, int]:
        """(k0, k1)."""
        return self.seed & WORD, self.seed >> 32 & WORD

    def counter(self) -> tuple[int, int, int]:
        """(c1, c2, c3). Raises QzoError for a number that no word holds."""
        words = (self.tensor, self.direction, self.step)
        if not all(0 <= word <= WORD for word in words):
            raise QzoError(
                f"tensor, direction, step = {words} are not in 0 ... {WORD}, of which Philox counts; start a new run "
                "with another seed"
            )
        return words


def tile_elements(distribution: str) -> int:
    """Elements that 16 blocks make."""
    return LANES * BLOCK_BITS // BITS[distribution]


def draw(out: Tensor, start: int, stream: Stream, distribution: str) -> None:
    """As `draw_by_operators`, by whatever is quickest here; which it is makes no difference to z."""
    if asked.takes(out) and out.is_contiguous() and start + len(out) < COUNTED:
        if not out.is_meta:
            asked.kernels("both").draw(out, start, stream, distribution)
    elif not can_draw(out):
        draw_by_operators(out, start, stream, distribution)
    else:
        _draw_natively(out, start, stream, distribution)


def _draw_natively(out: Tensor, start: int, stream: Stream, distribution: str) -> None:
    check_end(start + len(out), distribution)
    counter, threads = stream.counter(), native.threads_for(len(out), LEAST_DRAWN)
    if not isinstance(out, FakeTensor):
        seed, bits = stream.seed & SEED, BITS[distribution]
        native.library().qzo_draw(out.data_ptr(), start, len(out), seed, *counter, bits, threads)


def can_draw(out: Tensor) -> bool:
    """Whether compiled code writes z to `out`."""
    return native.takes(out) and out.dtype == torch.float32 and out.dim() == 1 and out.is_contiguous()


def draw_by_operators(out: Tensor, start: int, stream: Stream, distribution: str) -> None:
    """Write z of elements start ... start + len(out) - 1 to `out`, 1-D, of any floating point dtype and device.

    Extra memory: see PIECE. Raises QzoError for elements that no block has.
    """
    tile, end = tile_elements(distribution), start + len(out)
    check_end(end, distribution)
    last = -(-end // tile)
    for first in range(start // tile, last, PIECE // tile):
        tiles = min(PIECE // tile, last - first)
        low, high = max(start, first * tile), min(end, (first + tiles) * tile)
        part, is_whole = out[low - start : high - start], high - low == tiles * tile
        z = part if is_whole else out.new_empty(tiles * tile)
        _write(z.view(tiles, -1, LANES), blocks(first * LANES, tiles * LANES, stream, out.device), BITS[distribution])
        if not is_whole:
            part.copy_(z[low - first * tile : high - first * tile])


def check_end(end: int, distribution: str) -> None:
    """Raise QzoError for more elements than 2**32 blocks make."""
    most = (WORD + 1) * BLOCK_BITS // BITS[distribution]
    if end > most:
        raise QzoError(
            f"a tensor of {end} elements has more than the {most} that there are random numbers for; choose "
            'noise="torch"'
        )


def blocks(first: int, count: int, stream: Stream, device: torch.device) -> Tensor:
    """The words of `count` blocks from number `first` on, int64 [4, count]."""
    words = torch.empty(4, count, dtype=torch.int64, device=device)
    torch.arange(first, first + count, out=words[0])
    for word, value in zip(words[1:], stream.counter(), strict=True):
        word.fill_(value)
    return philox4x32(words, stream.key())


def philox4x32(words: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox 4x32-10 of counters, int64 [4, count] with 32 bits in each, in place; returns them.

    A product of 64 bits wraps to negative numbers, whose bits are those of the unsigned one. Extra memory: two rows.
    """
    first, second = torch.empty_like(words[0]), torch.empty_like(words[0])
    for number in range(ROUNDS):
        k0, k1 = ((k + number * weyl) & WORD for k, weyl in zip(key, WEYL, strict=True))
        torch.mul(words[0], MULTIPLIERS[0], out=first)
        torch.mul(words[2], MULTIPLIERS[1], out=second)
        for place, product, k in ((0, second, k0), (2, first, k1)):
            torch.bitwise_right_shift(product, 32, out=words[place])
            words[place].bitwise_and_(WORD).bitwise_xor_(words[place + 1]).bitwise_xor_(k)
            torch.bitwise_and(product, WORD, out=words[place + 1])
    return words


def _write(z: Tensor, words: Tensor, bits: int) -> None:
    """z [tiles, E, LANES] of blocks [4, tiles * LANES], which are overwritten."""
    if bits == 16:
        _count_halves(words)
    mask, per_word = 31 if bits == 16 else 1, 32 // bits
    runs = z.view(len(z), 4, per_word, LANES)
    counts = torch.empty_like(words)
    for place in range(per_word):
        torch.bitwise_right_shift(words, bits * place, out=counts).bitwise_and_(mask)
        runs[:, :, place].copy_(counts.view(4, len(z), LANES).transpose(0, 1))
    z.sub_(bits / 2).mul_(2 / math.sqrt(bits))


def _count_halves(words: Tensor) -> None:
    """Each half of a word becomes the number of its bits."""
    other = torch.empty_like(words)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        torch.bitwise_right_shift(words, shift, out=other).bitwise_and_(mask)
        words.bitwise_and_(mask).add_(other)
