"""What a run takes of memory: bytes of its tensors by role, counted, and what the process had at its peak, measured."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.live.scales import quantized_layers, quantized_tensors

STATUS = Path("/proc/self/status")


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors: "quantization" (codes, scales and what else packed layers hold) and "weights"."""
    packed = {_key(tensor): tensor for tensors in quantized_tensors(model).values() for tensor in tensors}
    others = {_key(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = [tensor for key, tensor in others.items() if key not in packed]
    return {"weights": _bytes(plain), "quantization": _bytes(packed.values())}


def packed_as(model: nn.Module) -> dict[str, Any] | None:
    """How most quantized linear layers hold their weights: class, what its format calls it, bits and group size."""
    kinds = Counter(
        (type(layer).__name__, layer.type_name, getattr(layer, "n_bits", None), getattr(layer, "group_size", None))
        for layer in quantized_layers(model).values()
        if not layer.is_table
    )
    names = ("layer", "type", "bits", "group_size")
    return dict(zip(names, kinds.most_common(1)[0][0], strict=True)) if kinds else None


def peak_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Of the process from its start until now, in bytes: "process", and the optimizer's state, "optimizer".

    "process" is the peak of resident memory, where files that are mapped and shared libraries count. On a GPU also
    "allocated" and "reserved", the peaks of PyTorch's allocator there.
    """
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    found = {"process": _peak_of_process(), "optimizer": _bytes(states)}
    if torch.cuda.is_initialized():
        found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return found


def _peak_of_process() -> int:
    """The high-water mark since the program was loaded; `getrusage` would count what forked it, too."""
    with suppress(OSError):
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
