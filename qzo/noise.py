"""z as a function of (seed, step, tensor index, direction): drawn again when needed, never stored, never whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MASK = 2**64 - 1
DISTRIBUTIONS = ("gaussian", "rademacher")
Device = torch.device | str


def mix_seed(*words: int) -> int:
    """Mix integers into one 64-bit seed: h = splitmix64(h xor word), word by word from h = 0.

    splitmix64 (Steele, Lea and Flood, 2014): x += 0x9E3779B97F4A7C15, then two xor-shift-multiply rounds. It is a
    bijection, so neighbouring seeds, steps and indices give unrelated streams.
    """
    state = 0
    for word in words:
        state = _splitmix64((state ^ word) & MASK)
    return state


def chunk_elements(numel: int) -> int:
    """Elements of z that exist at a time: a quarter of the tensor, within 2**8 ... 2**22 (1 KiB ... 16 MiB)."""
    return min(max(numel // 4, 2**8), 2**22)


def noise_chunks(
    numel: int,
    seed: int,
    step: int,
    index: int,
    device: Device,
    direction: int = 0,
    distribution: str = "gaussian",
) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, z), z fp32 1-D for elements start : start + len(z) of tensor `index` at `step`.

    z ~ N(0, 1), or ±1 with even odds for "rademacher". `direction` counts the directions of one step from 0. The same
    arguments give the same z on the same kind of device (CPU and CUDA differ). All chunks share one buffer: the caller
    may change z in place and must be done with it before the next. The generator is private; the global RNG is neither
    read nor moved. On `meta` nothing is drawn.
    """
    generator = _generator(seed, step, index, direction, device)
    buffer = torch.empty(min(numel, chunk_elements(numel)), dtype=torch.float32, device=device)
    for start in range(0, numel, max(1, len(buffer))):
        yield start, _draw(buffer[: numel - start], generator, distribution)


def mixed_chunks(
    numel: int,
    seed: int,
    step: int,
    index: int,
    device: Device,
    factors: Sequence[float],
    distribution: str = "gaussian",
) -> Iterator[tuple[int, Tensor]]:
    """As `noise_chunks`, but Σ_j factors[j] z_j over the directions j of the step.

    One buffer for one direction, two for more, however many they are.
    """
    generators = [_generator(seed, step, index, direction, device) for direction in range(len(factors))]
    total = torch.empty(min(numel, chunk_elements(numel)), dtype=torch.float32, device=device)
    buffer = torch.empty_like(total) if len(factors) > 1 else total
    for start in range(0, numel, max(1, len(total))):
        mixed = _draw(total[: numel - start], generators[0], distribution).mul_(factors[0])
        for generator, factor in zip(generators[1:], factors[1:], strict=True):
            mixed.add_(_draw(buffer[: numel - start], generator, distribution).mul_(factor))
        yield start, mixed


def full_noise(
    shape: torch.Size,
    seed: int,
    step: int,
    index: int,
    device: Device,
    direction: int = 0,
    distribution: str = "gaussian",
) -> Tensor:
    """All of z for one tensor, fp32 in `shape`: what `noise_chunks` yields, put together."""
    drawn = noise_chunks(shape.numel(), seed, step, index, device, direction, distribution)
    chunks = [z.clone() for _, z in drawn]
    return torch.cat(chunks).view(shape) if chunks else torch.empty(shape, device=device)


def _generator(seed: int, step: int, index: int, direction: int, device: Device) -> torch.Generator:
    device = torch.device(device)
    words = (seed, step, index, direction) if direction else (seed, step, index)
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(mix_seed(*words))


def _draw(buffer: Tensor, generator: torch.Generator, distribution: str) -> Tensor:
    if distribution == "rademacher":
        return buffer.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    return buffer.normal_(generator=generator)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
