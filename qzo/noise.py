"""z as a function of (seed, step, tensor index): drawn again whenever it is needed, never stored, never whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MASK = 2**64 - 1


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
    numel: int, seed: int, step: int, index: int, device: torch.device | str
) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, z) with z ~ N(0, 1) fp32 1-D for elements start : start + len(z) of tensor `index` at `step`.

    The same arguments give the same z on the same kind of device (CPU and CUDA differ). All chunks share one buffer:
    the caller may change z in place and must be done with it before the next. The generator is private; the global
    RNG is neither read nor moved. On `meta` nothing is drawn.
    """
    device = torch.device(device)
    generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(mix_seed(seed, step, index))
    buffer = torch.empty(min(numel, chunk_elements(numel)), dtype=torch.float32, device=device)
    for start in range(0, numel, max(1, len(buffer))):
        yield start, buffer[: numel - start].normal_(generator=generator)


def full_noise(shape: torch.Size, seed: int, step: int, index: int, device: torch.device | str) -> Tensor:
    """All of z for one tensor, fp32 in `shape`: what `noise_chunks` yields, put together."""
    chunks = [z.clone() for _, z in noise_chunks(shape.numel(), seed, step, index, device)]
    return torch.cat(chunks).view(shape) if chunks else torch.empty(shape, device=device)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
