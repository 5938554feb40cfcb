"""What every kernel in Triton needs of a GPU, compiled for one of a format, an architecture and a number of rows."""

from __future__ import annotations

import torch
from packed_layers import FORMATS
from triton_kernels import usage

from qzo.kernels.packed import BLOCKS, PAIRS
from qzo.kernels.philox import Stream

SHAPE = 128, 256
STACK_BYTES, SHARED_BYTES = 64, 99 << 10  # a multiprocessor of an RTX 4090 (sm_89) has the least
CAPABILITIES = (80, 89, 90)
ROWS = (1, 32, 64)  # of x, one for each tile
KERNELS = ("rebuild", "product", "dual", "draw")


def needs(kernel: str, name: str, capability: int, rows: int = 64) -> dict[str, int]:
    """Registers, and bytes of stack and of shared memory, for x, y and the weight in bf16."""
    packed = FORMATS[name](SHAPE).packed()
    x, y = (torch.empty(rows, size, dtype=torch.bfloat16) for size in SHAPE[::-1])
    if kernel == "rebuild":
        whole = torch.empty(SHAPE, dtype=torch.bfloat16)
        weight = whole if packed.layout in (BLOCKS, PAIRS) else whole.view(SHAPE[::-1]).t()
        return usage("rebuild_kernel", lambda launch: launch.rebuild(weight, packed, 0), "launch", capability)
    if kernel == "product":
        return usage("product_kernel", lambda launch: launch.multiply(y, packed, x), "launch", capability)
    stream, masters = Stream(0, 1, 2, 3), torch.empty(packed.scales.shape)
    if kernel == "draw":
        flat = masters.view(-1)
        return usage("draw_kernel", lambda both: both.draw(flat, 0, stream, "binomial"), "both", capability)
    starts = None if packed.offsets is None else (masters, masters)
    given = packed, (x, x), masters, stream, 1e-3, "binomial", True, starts
    return usage("dual_kernel", lambda both: both.multiply_both((y, y), *given), "both", capability)


def fits(found: dict[str, int]) -> bool:
    """Whether registers are enough, and shared memory."""
    return found["stack"] <= STACK_BYTES and found["shared"] <= SHARED_BYTES
