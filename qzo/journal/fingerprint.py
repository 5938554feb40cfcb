"""What a run starts from, as hashes: the model's numbers and this machine's random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qzo.live.scales import quantized_layers
from qzo.optim.estimator import Estimator
from qzo.optim.noise import full_noise
from qzo.optim.spsa import SpsaOptimizer


def model_hash(model: nn.Module, optimizer: SpsaOptimizer) -> str:
    """SHA-256 of all codes, scales and other buffers of quantized layers, and of all trained tensors, as they stand.

    Names, dtypes and shapes count too; unquantized parameters that are not trained do not.
    Extra memory: one tensor at a time where it is not on the CPU.
    """
    buffers = [
        (f"{path}.{name}", buffer)
        for path, layer in quantized_layers(model).items()
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    return digest([*buffers, *((name, tensor) for _, name, _, tensor in optimizer._tensors())])


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors in their order, each storage with its first name only."""
    total = hashlib.sha256()
    seen: set[tuple[int, int]] = set()
    for name, tensor in tensors:
        key = (tensor.data_ptr(), tensor.numel())
        if key in seen:
            continue
        seen.add(key)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def noise_fingerprint(device: torch.device, estimator: Estimator) -> str:
    """SHA-256 of z for one fixed key: of a generator other on another kind of device, and where PyTorch's changed; of
    Philox everywhere the same.
    """
    z = full_noise(torch.Size([5000]), 0, 0, 0, device, 0, estimator.distribution, estimator.noise)
    return digest([("z", z)])
