"""Kernels in Triton without a GPU: run by its interpreter on CPU tensors, or compiled for a GPU that is not there.

Triton decides between the two when a kernel is defined, so the modules of `qzo.kernels.triton` are read once for each.
Its interpreter truncates where fp32 becomes bf16, and multiplies bf16 tiles wrongly: here x is fp16 or fp32.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qzo.kernels import asked

pytest.importorskip("triton", reason="needs triton")
FOLDER = "qzo.kernels.triton"
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


@cache
def kernels(name: str, interpreted: bool) -> ModuleType:
    """A module of qzo/kernels/triton whose kernels the interpreter runs, or that are to be compiled."""
    return _modules(interpreted)[name]


@cache
def _modules(interpreted: bool) -> dict[str, ModuleType]:
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(FOLDER)}
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": str(int(interpreted))}):
        made = {name: import_module(f"{FOLDER}.{name}") for name in ("launch", "both", "moves")}
    for name in list(sys.modules):
        if name.startswith(FOLDER):
            del sys.modules[name]
    sys.modules.update(before)
    return made


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Within, layers on the CPU are computed by the kernels, in the interpreter."""
    with mock.patch.multiple(asked, DEVICES=("cpu",), kernels=partial(kernels, interpreted=True)), asked.by_triton():
        yield


class Recorded:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((arguments, options))


def usage(kernel: str, launch: Callable[[ModuleType], object], module: str, capability: int) -> dict[str, int]:
    """Compile what `launch(module)` starts of a kernel for a GPU; registers, and bytes of stack and shared memory."""
    of = kernels(module, False)
    recorded = Recorded(getattr(of, kernel))
    with mock.patch.object(of, kernel, recorded):
        launch(of)
    (call,) = recorded.calls
    compiled = _compiled(recorded.kernel, *call, capability)
    return {**_resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared}


def _compiled(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    """As Triton would for these arguments: 16 bytes aligned, and numbers told from multiples of 16 and from 1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, words = kernel.arg_names, {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    constants = {name: value for name, value in options.items() if name in names}
    signature, attributes = dict.fromkeys(names, "constexpr"), {}
    for place, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name], is_aligned = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], is_aligned = "fp32", False
        elif value == 1 and name not in words:
            constants[name], is_aligned = 1, False
        else:
            signature[name], is_aligned = "i32", value % 16 == 0 and name not in words
        if is_aligned:
            attributes[place,] = [["tt.divisibility", 16]]
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    further = {name: value for name, value in options.items() if name not in names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=further)


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", told)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
