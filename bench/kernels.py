"""What CUDA kernels do differently from the meta kernels that the simulator runs: one small rule for each fact."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench.attention import attend
from bench.gpus import Gpu
from bench.ledger import Ledger, Rule

aten = torch.ops.aten

# CUDAHooks / CUDABlas: cuBLAS gets a workspace from the caching allocator for each handle, and autograd's thread has a
# handle of its own; 8 x 4 MiB on Hopper, 2 x 4 MiB + 8 x 16 KiB elsewhere (CUBLAS_WORKSPACE_CONFIG's default).
HOPPER_WORKSPACE_BYTES = 32 << 20
CUBLAS_WORKSPACE_BYTES = (8 << 20) + (128 << 10)
# Operators that write into a tensor of known shape and allocate nothing: without data there is nothing to do, and
# not running their meta kernels (Python, for most) makes the chunk loops of large models ten times faster to trace.
IN_PLACE = (
    "add_.Tensor", "addcdiv_.default", "addcmul_.default", "bitwise_and_.Scalar", "clamp_.default",
    "clamp_min_.default", "copy_.default", "div_.Tensor", "fill_.Scalar", "lerp_.Scalar", "mul_.Tensor",
    "normal_.default", "sqrt_.default", "sub_.Tensor", "uniform_.default", "zero_.default",
)  # fmt: skip
IN_PLACE_LISTS = (  # the same for lists of tensors; they return nothing
    "_foreach_add_.Scalar", "_foreach_addcdiv_.ScalarList", "_foreach_addcmul_.Scalar", "_foreach_div_.ScalarList",
    "_foreach_lerp_.Scalar", "_foreach_mul_.Scalar",
)  # fmt: skip
OUT = ("add.out", "mul.out", "sub.out")
# CUDA's softmax reads fp16 and writes fp32 in one kernel (SoftMax.cpp); elsewhere, and for bf16, a cast comes first.
SOFTMAX = {F.softmax: aten._softmax, F.log_softmax: aten._log_softmax}
GEMMS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def read_scalar(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> bool | float | int:
    """`.item()` of a tensor without data: losses are 0.0, and checks such as "is the mask all ones" hold."""
    if not args[0].is_meta:
        return func(*args, **kwargs)
    if args[0].dtype is torch.bool:
        return True
    return 0.0 if args[0].is_floating_point() else 0


class GemmRule:
    """The first matrix product of each thread allocates that thread's cuBLAS workspace, which is never freed."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.seen: set[bool] = set()

    def __call__(self, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
        out = ledger.run(func, args, kwargs)
        backward = torch._C._current_graph_task_id() != -1
        if backward not in self.seen:
            self.seen.add(backward)
            ledger.see(out)  # a kernel's result is allocated before its workspace
            ledger.allocate(self.nbytes)
        return out


def write(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """The tensor that an in-place operator or one with `out=` writes into."""
    return kwargs["out"] if "out" in kwargs else args[0]


def write_list(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> None:
    """An in-place operator on a list of tensors."""


def route_evenly(experts: int, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """`nonzero` of an expert mask [tokens, top_k]: tokens spread evenly over `experts`, at least one for each."""
    mask = args[0]
    return mask.new_empty((max(1, -(-mask.numel() // experts)), mask.dim()), dtype=torch.long)


def softmax_backward(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """CUDA multiplies grad by output into a temporary first (SoftMax.cu, softmax_backward_cuda_out)."""
    grad = args[0]
    out = ledger.run(func, args, kwargs)
    ledger.see(out)
    ledger.release(ledger.allocate(grad.numel() * grad.element_size()))
    return out


def grouped_product(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """CUDA multiplies grouped experts in any float dtype, the meta kernel only in bf16: let it tell the shape."""
    halves = tuple(item.to(torch.bfloat16) if item is not None and item.is_floating_point() else item for item in args)
    return func(*halves, **kwargs).to(args[0].dtype)


def rules(gpu: Gpu, experts: int = 1) -> dict[Any, Rule]:
    """Operator -> rule for one simulated process on `gpu`; `experts` is the model's number of experts a layer."""
    hopper = gpu.compute_capability[0] == 9
    gemm = GemmRule(HOPPER_WORKSPACE_BYTES if hopper else CUBLAS_WORKSPACE_BYTES)
    table: dict[Any, Rule] = {
        aten._local_scalar_dense.default: read_scalar,
        aten.nonzero.default: partial(route_evenly, experts),
    }
    table.update(dict.fromkeys(GEMMS, gemm))
    table[aten._grouped_mm.default] = grouped_product
    table[aten._softmax_backward_data.default] = softmax_backward
    for rule, names in ((write, IN_PLACE + OUT), (write_list, IN_PLACE_LISTS)):
        table.update({_operator(name): rule for name in names})
    return table


def _operator(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(aten, packet), overload)


class CudaFunctions(TorchFunctionMode):
    """Functions that choose another kernel on CUDA than on meta: attention, softmax and dropout.

    Args:
        attention: "flash" or "efficient", the kernel that scaled_dot_product_attention is pinned to.
    """

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attend(self.attention, *args, **kwargs)
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
