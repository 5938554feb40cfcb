"""z as a function of (seed, step, tensor index, direction): drawn again when needed, never stored, never all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from qzo.kernels import philox
from qzo.kernels.philox import Stream

MASK = 2**64 - 1
WHOLE_TILES = 2**11  # elements, of either distribution
Device = torch.device | str
Draw = Callable[[Tensor, int], Tensor]


def mix_seed(*words: int) -> int:
    """Mix integers into one 64-bit seed: h = splitmix64(h xor word), word by word from h = 0.

    splitmix64 (Steele, Lea and Flood, 2014): x += 0x9E3779B97F4A7C15, then two xor-shift-multiply rounds. It is a
    bijection, so neighbouring seeds, steps and indices give unrelated streams.
    """
    state = 0
    for word in words:
        state = _splitmix64((state ^ word) & MASK)
    return state


def chunk_elements(numel: int, noise: str = "generator") -> int:
    """Elements of z that are drawn at a time: a quarter of the tensor, within 2**8 ... 2**22 (1 KiB ... 16 MiB).

    What z is depends on it with noise="generator", which gives other numbers when it is asked for more or fewer at a
    time. With "philox" z is the same whatever it is: within 2**17 ... 2**18 (512 KiB ... 1 MiB, for a CPU's cache).
    """
    if noise == "philox":
        return min(max(numel // 4 // WHOLE_TILES * WHOLE_TILES, 2**17), 2**18)
    return min(max(numel // 4, 2**8), 2**22)


def noise_chunks(
    numel: int,
    seed: int,
    step: int,
    index: int,
    device: Device,
    direction: int = 0,
    distribution: str = "gaussian",
    least: int = 0,
    noise: str = "generator",
) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, z), z fp32 1-D for elements start : start + len(z) of tensor `index` at `step`.

    A z is one chunk, or as many as have `least` elements, or all there are. `direction` counts the directions of one
    step from 0.

    noise="generator": z ~ N(0, 1), or ±1 with even odds for "rademacher", by PyTorch's generator, of its own: the
    global RNG is neither read nor moved. The same arguments give the same z on the same kind of device (CPU and CUDA
    differ). noise="philox": "rademacher" or "binomial" (bell-shaped, of 17 values) of `qzo.kernels.philox`, the same to
    the bit on every device.

    All chunks share one buffer: the caller may change z in place and must be done with it before the next. On `meta`
    nothing is drawn, and of many chunks only the first two and the last are there: what a caller holds for one of the
    others is what it held for the one before.
    """
    draw = _drawer(noise, distribution, (seed, step, index, direction), numel, device)
    buffer = _buffer(numel, least, noise, device)
    for start in _starts(numel, len(buffer), device):
        yield start, draw(buffer[: numel - start], start)


def mixed_chunks(
    numel: int,
    seed: int,
    step: int,
    index: int,
    device: Device,
    factors: Sequence[float],
    distribution: str = "gaussian",
    least: int = 0,
    noise: str = "generator",
) -> Iterator[tuple[int, Tensor]]:
    """As `noise_chunks`, but Σ_j factors[j] z_j over the directions j of the step.

    One buffer for one direction, two for more, however many they are.
    """
    keys = [(seed, step, index, direction) for direction in range(len(factors))]
    draws = [_drawer(noise, distribution, key, numel, device) for key in keys]
    total = _buffer(numel, least, noise, device)
    buffer = torch.empty_like(total) if len(factors) > 1 else total
    for start in _starts(numel, len(total), device):
        mixed = draws[0](total[: numel - start], start).mul_(factors[0])
        for draw, factor in zip(draws[1:], factors[1:], strict=True):
            mixed.add_(draw(buffer[: numel - start], start).mul_(factor))
        yield start, mixed


def full_noise(
    shape: torch.Size,
    seed: int,
    step: int,
    index: int,
    device: Device,
    direction: int = 0,
    distribution: str = "gaussian",
    noise: str = "generator",
) -> Tensor:
    """All of z for one tensor, fp32 in `shape`: what `noise_chunks` yields, put together."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, device=device)
    drawn = noise_chunks(shape.numel(), seed, step, index, device, direction, distribution, 0, noise)
    chunks = [z.clone() for _, z in drawn]
    return torch.cat(chunks).view(shape) if chunks else torch.empty(shape, device=device)


def _drawer(noise: str, distribution: str, key: tuple[int, int, int, int], numel: int, device: Device) -> Draw:
    """What writes z of the elements from `start` on to a buffer; of a generator in turn, from 0 on."""
    if noise == "philox":
        return partial(_of_stream, Stream(*key), distribution)
    return partial(_of_generator, _generator(*key, device), distribution, chunk_elements(numel))


def _of_stream(stream: Stream, distribution: str, buffer: Tensor, start: int) -> Tensor:
    philox.draw(buffer, start, stream, distribution)
    return buffer


def _of_generator(generator: torch.Generator, distribution: str, chunk: int, buffer: Tensor, _: int) -> Tensor:
    for part in buffer.split(chunk):
        if distribution == "rademacher":
            part.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        else:
            part.normal_(generator=generator)
    return buffer


def _generator(seed: int, step: int, index: int, direction: int, device: Device) -> torch.Generator:
    device = torch.device(device)
    words = (seed, step, index, direction) if direction else (seed, step, index)
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(mix_seed(*words))


def _buffer(numel: int, least: int, noise: str, device: Device) -> Tensor:
    """Room for the fewest whole chunks that have `least` elements, or for all `numel`."""
    chunk = chunk_elements(numel, noise)
    return torch.empty(min(numel, chunk * max(1, -(-least // chunk))), dtype=torch.float32, device=device)


def _starts(numel: int, size: int, device: Device) -> Sequence[int]:
    """Where the chunks begin that are yielded."""
    starts = range(0, numel, max(1, size))
    return (*starts[:2], starts[-1]) if torch.device(device).type == "meta" and len(starts) > 3 else starts


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
