"""What CUDA kernels do differently from the meta kernels that the simulator runs: one small rule for each fact."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench.cases.gpus import Gpu
from bench.ledger.ledger import Ledger, Rule
from bench.simulator.cuda.attention import AMPERE, Capability
from bench.simulator.cuda.attention_kernels import attend
from bench.simulator.cuda.attention_temporaries import attention_rules
from bench.simulator.cuda.products import Products
from bench.simulator.cuda.temporaries import hold, run_seen, with_temporaries
from bench.simulator.shared import (
    IN_PLACE,
    IN_PLACE_LISTS,
    OUT,
    _operator,
    grouped_product,
    keep_layers,
    route_evenly,
    write,
    write_list,
)

aten = torch.ops.aten

# CUDA's softmax reads fp16 and writes fp32 in one kernel (SoftMax.cpp); elsewhere, and for bf16, a cast comes first.
SOFTMAX = {F.softmax: aten._softmax, F.log_softmax: aten._log_softmax}
# EmbeddingBackwardKernel.cu: up to so many indices are added without a temporary; above, rows are summed by tens first.
UNSORTED_INDICES = 3072
ROWS_PER_THREAD = 10
FP32_BYTES = 4


def read_scalar(padded: bool, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> bool | float | int:
    """`.item()` of a tensor without data: losses are 0.0, "is the mask all ones" holds unless batches are `padded`."""
    if not args[0].is_meta:
        return func(*args, **kwargs)
    if args[0].dtype is torch.bool:
        return not padded
    return 0.0 if args[0].is_floating_point() else 0


def read_numbers(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Losses without data that the CPU waits for, fp64 (qzo/optim/losses.py), are 0, as those of `read_scalar` are."""
    if args[0].is_meta and args[0].dtype == torch.float64 and kwargs.get("device") == torch.device("cpu"):
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
    return ledger.run(func, args, kwargs)


def softmax_backward(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """CUDA multiplies grad by output into a temporary first (SoftMax.cu, softmax_backward_cuda_out)."""
    return with_temporaries(ledger, func, args, kwargs, [args[0].numel() * args[0].element_size()])


def embedding_backward(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Many indices are sorted, and sums of up to ten rows each are kept in fp32 for as many rows as there can be
    (Embedding.cu, embedding_dense_backward_cuda; EmbeddingBackwardKernel.cu). CUB's sort works in as much memory again
    as its keys and values; its few KiB of counters are left out.
    """
    grad, indices, rows = args[:3]
    number = indices.numel()
    if number <= UNSORTED_INDICES:
        return ledger.run(func, args, kwargs)
    held = [ledger.allocate(indices.nbytes) for _ in range(2)]  # sorted, and where they came from
    hold(ledger, [indices.nbytes] * 3)
    out = run_seen(ledger, func, args, kwargs)
    segments = min(number, rows)
    sums = number // ROWS_PER_THREAD + segments
    long = indices.element_size()
    hold(ledger, [indices.nbytes, segments * long, segments * long, sums * long, sums * grad.shape[-1] * FP32_BYTES])
    for block in held:
        ledger.release(block)
    return out


def rules(gpu: Gpu, experts: int = 1, padded: bool = False) -> dict[Any, Rule]:
    """Operator -> rule for one simulated process on `gpu`.

    Args:
        experts: the model's number of experts a layer.
        padded: rows of a batch differ in length, so that masks are not all ones.
    """
    table: dict[Any, Rule] = {
        aten._local_scalar_dense.default: partial(read_scalar, padded),
        aten._to_copy.default: read_numbers,
        aten.nonzero.default: partial(route_evenly, experts),
        aten.rand.default: keep_layers,
        aten._grouped_mm.default: grouped_product,
        aten._softmax_backward_data.default: softmax_backward,
        aten.embedding_dense_backward.default: embedding_backward,
    }
    table.update(Products(gpu.compute_capability).rules())
    table.update(attention_rules(gpu))
    for rule, names in ((write, IN_PLACE + OUT), (write_list, IN_PLACE_LISTS)):
        table.update({_operator(name): rule for name in names})
    return table


class CudaFunctions(TorchFunctionMode):
    """Functions that choose another kernel on CUDA than on meta: attention, softmax and dropout.

    Args:
        attention: the kernel of `bench.simulator.cuda.attention.KERNELS` that scaled_dot_product_attention prefers.
        gpu: compute capability.
        strict: raise QzoError for a call that the preferred kernel cannot run, instead of taking another.
        ran: gets the names of the kernels that ran.
    """

    def __init__(
        self, attention: str, gpu: Capability = AMPERE, strict: bool = False, ran: set[str] | None = None
    ) -> None:
        super().__init__()
        self.attention = partial(attend, attention, gpu=gpu, strict=strict, ran=ran)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is F.dropout:
            return fused_dropout(*args, **kwargs)
        if func in SOFTMAX and kwargs.get("dtype") is torch.float32 and args[0].dtype is torch.float16:
            return SOFTMAX[func](args[0], kwargs.get("dim", *args[1:2]), True)
        return func(*args, **kwargs)


def fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's dropout keeps a bool mask; the decomposition for other devices keeps one in the input's dtype."""
    if not training or p == 0.0:
        return input
    out = aten.native_dropout(input, p, True)[0]
    return input.copy_(out) if inplace else out
