"""Which attention kernel runs: what a case asks for, and what PyTorch chooses for one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.cases.case import BenchCase
from bench.cases.models import ModelSource, supports_sdpa
from qzo.errors import QzoError

Capability = tuple[int, int]
KERNELS = ("flash", "efficient", "cudnn", "math")  # of scaled_dot_product_attention; "eager" is the model's own code
HALF = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)
PREFER_CUDNN = ((9, 0), (10, 0), (10, 3))  # check_prefer_cudnn_attention in sdp_utils.cpp, with cuDNN above 9.15
CUDNN_DROPOUT_STEPS = 16
USUAL_HEAD = 128
# Of the backward that FlashAttention has in no build for these; sm_86 to sm_89 and sm_120 to sm_121.
SMALL_SHARED_MEMORY = (((8, 6), (8, 9)), ((12, 0), (12, 1)))


@dataclass(frozen=True)
class Call:
    """One scaled_dot_product_attention, as far as the choice of its kernel depends on it.

    Attributes:
        head_dim: width of a head of q and k. value_dim: of one of v; None for the same.
        mask: whether there is an explicit one; causal: whether it is implied.
        grouped: whether several query heads share a key head (`enable_gqa`).
        queries, keys: tokens.
    """

    dtype: torch.dtype
    head_dim: int
    mask: bool = False
    requires_grad: bool = False
    dropout: float = 0.0
    causal: bool = False
    grouped: bool = False
    queries: int = 128
    keys: int = 128
    value_dim: int | None = None

    @property
    def one_width(self) -> bool:
        """Whether a head is as wide in v as in q and k; in latent attention it is not."""
        return self.value_dim in (None, self.head_dim)


def _alignment(gpu: Capability, call: Call) -> int:
    """Elements that a head must be a multiple of for CUTLASS (sdp_utils.cpp, minimum_gemm_alignment)."""
    tensor_cores = gpu >= AMPERE or (gpu >= (7, 0) and call.dtype in HALF)
    return max(4 if gpu >= AMPERE else 1, 16 // call.dtype.itemsize if tensor_cores else 1)


def _no_flash_backward(gpu: Capability, call: Call) -> bool:
    small = any(lowest <= gpu <= highest for lowest, highest in SMALL_SHARED_MEMORY)
    too_wide = 192 < call.head_dim <= 224 or (call.head_dim > 224 and call.dropout > 0)
    return call.requires_grad and small and too_wide


Limit = tuple[Callable[[Capability, Call], bool], str]  # (holds where the kernel cannot run, what it needs)
# sdp_utils.cpp of PyTorch 2.10 to 2.13: can_use_flash_attention, can_use_mem_efficient_attention and
# can_use_cudnn_attention. Nothing stops the math kernel.
LIMITS: dict[str, tuple[Limit, ...]] = {
    "flash": (
        (lambda gpu, call: gpu < AMPERE, "a GPU of compute capability 8.0 or more"),
        (lambda gpu, call: call.dtype not in HALF, "fp16 or bf16"),
        (lambda gpu, call: call.head_dim > 256, "heads of at most 256"),
        (lambda gpu, call: not call.one_width, "heads as wide in values as in queries"),
        (lambda gpu, call: call.mask, "a call without a mask"),
        (lambda gpu, call: call.causal and call.queries != call.keys, "as many queries as keys where it is causal"),
        (_no_flash_backward, "heads of at most 192, or above 224 without dropout, to train on this GPU"),
    ),
    "efficient": (
        (lambda gpu, call: call.dtype is torch.bfloat16 and gpu < AMPERE, "compute capability 8.0 or more for bf16"),
        (lambda gpu, call: bool(call.head_dim % _alignment(gpu, call)), "heads of a multiple of 16 bytes"),
        (lambda gpu, call: call.grouped, "as many key heads as query heads"),
    ),
    "cudnn": (
        (lambda gpu, call: gpu < AMPERE, "a GPU of compute capability 8.0 or more"),
        (lambda gpu, call: call.dtype not in HALF, "fp16 or bf16"),
        (lambda gpu, call: call.head_dim > 128, "heads of at most 128"),
        (lambda gpu, call: bool(call.head_dim % 8), "heads of a multiple of 8"),
        (lambda gpu, call: call.keys == 1, "more than one key"),
        (lambda gpu, call: call.dropout * CUDNN_DROPOUT_STEPS % 1 != 0, "a dropout of whole sixteenths"),
    ),
    "math": (),
}  # fmt: skip


def needs(kernel: str, gpu: Capability, call: Call) -> str | None:
    """What `kernel` would need to run `call` on a GPU of this compute capability; None where it can."""
    return next((what for stops, what in LIMITS[kernel] if stops(gpu, call)), None)


def preference(gpu: Capability, first: str | None = None) -> tuple[str, ...]:
    """Kernels in the order in which PyTorch tries them; `first` before all others."""
    order: tuple[str, ...] = ("flash", "efficient", "math")
    order = ("cudnn", *order) if gpu in PREFER_CUDNN else order
    return order if first is None else (first, *(kernel for kernel in order if kernel != first))


def choose_backend(gpu: Capability, call: Call, first: str | None = None) -> str:
    """The kernel that PyTorch runs for `call`: the first of `preference(gpu, first)` that can."""
    return next(kernel for kernel in preference(gpu, first) if needs(kernel, gpu, call) is None)


def head_size(source: ModelSource) -> int:
    """Width of an attention head: the narrowest where layers differ, a usual one where the config does not tell."""
    config = source.config.get_text_config()
    try:
        told = getattr(config, "head_dim", None)
    except RuntimeError:  # what transformers raises where layers differ (Gemma 4)
        told = min(layer.head_dim for layer in config.per_layer_config)
    if told:
        return told
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else USUAL_HEAD


def attention_of(case: BenchCase, source: ModelSource, gpu: Capability | None = None) -> str:
    """The case's own choice; without one flash where the GPU can run it, else what PyTorch runs instead there; eager
    where SDPA is no option.

    Args:
        gpu: compute capability; None for a CPU, which has one kernel for all names.

    Raises:
        QzoError: the case asks for a kernel that the architecture, or the GPU with this head size, cannot use.
    """
    if not supports_sdpa(source):
        if case.attention in (None, "eager"):
            return "eager"
        raise QzoError(
            f"{source.name} caps its attention scores, which {case.attention} attention cannot; choose eager"
        )
    if gpu is None:
        return case.attention or "flash"
    call = Call(torch.bfloat16, head_size(source), requires_grad=case.first_order, causal=True)
    if case.attention not in KERNELS:
        return case.attention or choose_backend(gpu, call, "flash")
    refuse_unable(case.attention, gpu, call)
    return case.attention


def refuse_unable(kernel: str, gpu: Capability, call: Call) -> None:
    """Raise QzoError, with what would do instead, if `kernel` cannot run `call`."""
    missing = needs(kernel, gpu, call)
    if missing is not None:
        repeated = replace(call, grouped=False)  # key and value heads are repeated for who asks for "efficient"
        able = [other for other in KERNELS if needs(other, gpu, repeated) is None]
        dtype, (major, minor) = str(call.dtype).removeprefix("torch."), gpu
        raise QzoError(
            f"{kernel} attention needs {missing}, not {dtype} with heads of {call.head_dim} on compute capability "
            f"{major}.{minor}; choose {', '.join(able)} or eager"
        )
