"""NaN and infinity in what a checkpoint stores: one of them makes every logit NaN, and training then is noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qzo.errors import NotFinite
from qzo.files.folder import Header, opened

SMALL = 2**20  # numbers: what an inspection reads of tensors that are no part of a quantized layer
CODES = ("weight", "W_q")  # of a quantized layer; bitsandbytes and HQQ may store the bytes of codes as floats
FLOATS = ("F16", "BF16", "F32", "F64")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; in one pass at the speed of memory, without extra memory."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.is_meta:
        return True
    numbers = tensor.detach()
    try:
        if numbers.sum().isfinite():  # twice as fast; NaN and infinity stay in every sum, and a large one has no more
            return True
        low, high = numbers.aminmax()  # both are NaN where one number is
    except RuntimeError:  # of a dtype that they do not know
        return bool(torch.isfinite(numbers.float()).all())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_stored(headers: dict[str, Header], layers: Iterable[str]) -> None:
    """Raise NotFinite, with the tensor's name, for numbers in safetensors files that are not finite.

    Read are all floating-point tensors of the quantized layers named, which are about a hundredth of their bytes
    (scales, offsets, codebooks, biases), and of the others those of up to 2^20 numbers (norms, biases; not the
    vocabulary of a real model). One tensor at a time is in memory.
    """
    quantized = set(layers)
    names: dict[Any, list[str]] = {}
    for name, header in headers.items():
        if header.dtype not in FLOATS:
            continue
        part = _is_of(name, quantized)
        if name.rpartition(".")[2] not in CODES if part else header.numel <= SMALL:
            names.setdefault(header.file, []).append(name)
    for file, own in names.items():
        if file.suffix != ".safetensors":
            continue
        with opened(file) as tensors:
            for name in own:
                check_tensor(f"{file}: {name}", tensors.get_tensor(name))


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise NotFinite for a tensor with NaN or infinity in it."""
    if not is_finite(tensor):
        bad = int(tensor.numel() - torch.isfinite(tensor.float()).sum())
        raise NotFinite(
            f"{name} has {bad:,} numbers of {tensor.numel():,} that are NaN or infinite: the model was damaged, or "
            "overflowed when it was made; download or quantize it again"
        )


def check_model(source: object, model: torch.nn.Module) -> None:
    """Raise NotFinite for a loaded model with NaN or infinity in a parameter, or in a buffer that checkpoints hold."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        check_tensor(f"{source}: {name}", tensor)


def check_made(source: object, model: torch.nn.Module) -> None:
    """As `check_model`, for the frequencies of rotary positions, which settings imply and no checkpoint holds."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            check_tensor(f"{source}: {name}", buffer)


def _is_of(name: str, paths: set[str]) -> bool:
    """Whether a tensor is of one of some layers."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return True
    return False
