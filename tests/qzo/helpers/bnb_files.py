"""Checkpoints written and read by transformers with bitsandbytes, and what the library says of them."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import standin
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


class OneRow:
    """The library's C functions, with a matrix of 4-bit numbers as one long row.

    Blocks run on from row to row, in its files and in its other kernels; its AVX512 kernel (0.50.2) begins a new one
    with each row, so that weights whose width is not a multiple of the block size come out wrong on such CPUs.
    """

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)
        if not name.startswith(("cdequantize_blockwise_cpu_nf4", "cdequantize_blockwise_cpu_fp4")):
            return function

        def in_one_row(codes: Any, absmax: Any, out: Any, block_size: Any, rows: Any, width: Any) -> None:
            function(codes, absmax, out, block_size, ctypes.c_longlong(1), ctypes.c_longlong(rows.value * width.value))

        return in_one_row


def mend_rows() -> None:
    """Let the library read rows that do not begin a block as it writes them, where it does not."""
    try:
        from bitsandbytes.backends.cpu import ops
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        return  # tests that need it are skipped
    weight = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(64).view(2, 96)
    if not torch.equal(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")), weight):
        ops.lib = OneRow(ops.lib)


mend_rows()


def quantized(plain: Path, kind: str, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    """A live model of the library, of an unquantized checkpoint."""
    config = BitsAndBytesConfig(**KINDS[kind] | options)
    return _plain_products(AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=dtype))


def _plain_products(model: PreTrainedModel) -> PreTrainedModel:
    """In train mode a CPU multiplies by dequantized weights, by int8 ones too, and no kernel rewrites scales.

    The library's layers stay in that mode whatever the model is put into.
    """
    for module in model.eval().modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()
            module.train = partial(_stay, module)  # type: ignore[method-assign]
    return model


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def write_bnb(plain: Path, out: Path, kind: str, **options: object) -> Path:
    """Quantize a checkpoint and save it."""
    quantized(plain, kind, **options).save_pretrained(out)
    for file in plain.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out


def writer(make_model: Callable[..., PreTrainedModel], place: Path) -> Callable[..., Path]:
    """`write(kind, family, **options)`: a checkpoint of a tiny model, with a tokenizer."""

    def write(kind: str = "nf4", family: str = "llama", **options: object) -> Path:
        if not (place / family).exists():
            make_model(family).save_pretrained(place / family)
            standin.write_tokenizer(place / family)
        return write_bnb(place / family, place / f"{family}-{kind}", kind, **options)

    return write


def read_bnb(folder: Path) -> PreTrainedModel:
    """The library's own model, in the dtypes of the file."""
    return _plain_products(AutoModelForCausalLM.from_pretrained(folder))


def library_logits(folder: Path, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return read_bnb(folder)(input_ids).logits


def library_scales(folder: Path) -> dict[str, Tensor]:
    """Layer path -> scales, of the library's modules; nested ones as it dequantizes them."""
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def of(module: nn.Module) -> Tensor | None:
        if isinstance(module, Linear8bitLt):
            return module.weight.SCB
        if not isinstance(module, Linear4bit):
            return None
        state = module.weight.quant_state
        return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax

    return {path: scales for path, module in read_bnb(folder).named_modules() if (scales := of(module)) is not None}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def untouched(folder: Path) -> dict[str, Tensor]:
    """What training leaves as it is: all but scales, and the offset of nested ones, which quant_state holds."""
    ends = ("absmax", "SCB", "nf4", "fp4")
    return {name: tensor for name, tensor in stored(folder).items() if not name.endswith(ends)}
