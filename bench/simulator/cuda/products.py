"""Matrix products on CUDA: the workspaces of cuBLAS and cuBLASLt, and 4-bit weights that are unpacked first."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from bench.ledger.ledger import Ledger, Rule
from bench.simulator.cuda.attention import Capability
from bench.simulator.cuda.temporaries import run_seen
from qzo.quiet import quiet_libraries

aten = torch.ops.aten

# CublasHandlePool.cpp, parseChosenWorkspaceSize: each handle gets a workspace from the caching allocator, and
# backward's thread has its own. 32 MiB from Hopper on (Blackwell since PyTorch 2.12), else 2 x 4 MiB and 8 x 16 KiB.
HOPPER = (9, 0)
HOPPER_WORKSPACE_BYTES = 32 << 20
CUBLAS_WORKSPACE_BYTES = (8 << 20) + (128 << 10)
# CublasHandlePool.cpp, parseCUDABlasLtWorkspaceSize: cuBLASLt has one more for each handle. PyTorch from 2.12 on can do
# without it, but all measurements of models with biases on the T4 have it: 2 MiB for two threads.
CUBLASLT_WORKSPACE_BYTES = 1 << 20
PRODUCTS = (
    aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm.out, aten.bmm.default, aten.bmm.out,
    aten.baddbmm.default,
)  # fmt: skip
# bitsandbytes multiplies few rows by the packed weight. Where that ends it decides by card and shape, between 4 and
# 1,536 rows (backends/cuda/ops.py, _gemm_4bit_use_custom_cuda); most of its borders for large layers lie at 64 or near.
FUSED_NF4_ROWS = 64


class Products:
    """The first product of each thread allocates that thread's workspace, which is never freed.

    Args:
        gpu: compute capability.
    """

    def __init__(self, gpu: Capability) -> None:
        self.nbytes = HOPPER_WORKSPACE_BYTES if gpu >= HOPPER else CUBLAS_WORKSPACE_BYTES
        self._seen: set[tuple[bool, int]] = set()

    def rules(self) -> dict[Any, Rule]:
        """Operator -> rule for every kind of product."""
        table: dict[Any, Rule] = dict.fromkeys(PRODUCTS, self)
        if importlib.util.find_spec("bitsandbytes"):
            with quiet_libraries():
                importlib.import_module("bitsandbytes")  # defines its operators
            table[torch.ops.bitsandbytes.gemm_4bit.default] = self.nf4
        return table

    def __call__(self, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
        out = run_seen(ledger, func, args, kwargs)  # a kernel's result is allocated before its workspace
        fused = func is aten.addmm.default and adds_bias_in_cublaslt(*args[:3], **kwargs)
        self._prepare(ledger, fused)
        return out

    def nf4(self, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """bitsandbytes unpacks the whole weight in the input's dtype for more than a few rows, then multiplies
        (backends/cuda/ops.py, _dequant_linear_fallback).
        """
        x, shape, bias = args[0], args[2], kwargs.get("bias")
        if x.numel() // x.shape[-1] <= FUSED_NF4_ROWS:
            return ledger.run(func, args, kwargs)
        weight = ledger.allocate(math.prod(shape) * x.element_size())
        out = run_seen(ledger, func, args, kwargs)
        self._prepare(ledger, bias is not None)
        ledger.release(weight)
        return out

    def _prepare(self, ledger: Ledger, cublaslt: bool) -> None:
        backward = torch._C._current_graph_task_id() != -1
        for nbytes in (self.nbytes, CUBLASLT_WORKSPACE_BYTES) if cublaslt else (self.nbytes,):
            if (backward, nbytes) not in self._seen:
                self._seen.add((backward, nbytes))
                ledger.allocate(nbytes)


def adds_bias_in_cublaslt(bias: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> bool:
    """Whether a product and its bias go to cuBLASLt in one (Blas.cpp, isInputCompliesAddmmCudaLt)."""
    matrices = min(*left.shape, *right.shape) > 1
    return beta == 1 and bias.dim() == 1 and bias.is_contiguous() and bias.shape[0] == right.shape[1] and matrices
