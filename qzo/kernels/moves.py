"""Numbers moved along z on a CPU: what becomes of their fp32 masters, and what is written of it, in one compiled pass.

    v = z f,  v = v θ where relative,  v = θ + v,  v = max(v, 0) where nonnegative
    live = v in the dtype of the live tensor;  where an offset follows, m = m0 (v / s0) in its dtype, m0 where s0 = 0

Each product, sum and quotient is rounded, so that all of it is to the bit what PyTorch's operators make in six passes
and more. With `keeps` the master becomes v. Without z, v = θ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qzo.kernels import native

LEAST_MOVED = 2**16  # numbers, from which on it is worth to wake the other threads
Following = tuple[Tensor, Tensor, Tensor]  # the offset m, s0 and m0


class Moved:
    """A live tensor and its master, and what follows it where something does; all of them as flat tensors on a CPU.

    Live tensor and offset may have a stride. Masters, s0 and m0 are fp32 and contiguous.
    """

    def __init__(self, live: Tensor, master: Tensor, following: Following | None = None) -> None:
        """Take the tensors; see `can_move`."""
        self._is_fake = isinstance(master, FakeTensor)
        if self._is_fake:
            return
        self._tensors = (live, master, following)  # kept alive
        struct = native.MovedStruct(master.data_ptr(), *_flat(live))
        if following is not None:
            struct.offset, struct.offset_kind, struct.offset_stride = _flat(following[0])
            struct.scale_start, struct.offset_start = following[1].data_ptr(), following[2].data_ptr()
        self._struct = struct

    def move(
        self,
        start: int,
        count: int,
        z: Tensor | None = None,
        factor: float = 1.0,
        *,
        relative: bool = False,
        nonnegative: bool = False,
        keeps: bool = False,
    ) -> None:
        """Move elements start ... start + count - 1, whose z, fp32, is left as it is."""
        if self._is_fake:
            return
        at, threads = None if z is None else z.data_ptr(), native.threads_for(count, LEAST_MOVED)
        native.library().qzo_move(self._struct, at, factor, relative, nonnegative, keeps, start, count, threads)


def can_move(live: Tensor, master: Tensor, following: Following | None = None) -> bool:
    """Whether compiled code may move these."""
    written, read = [live], [master]
    if following is not None:
        written.append(following[0])
        read += following[1:]
    kinds = all(native.NUMBERS.get(tensor.dtype, 3) < 3 for tensor in written)
    plain = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in read)
    return kinds and plain and native.takes(*written, *read)


def _flat(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), native.NUMBERS[tensor.dtype], tensor.stride(0)
