"""HQQ by its own library: quantized and saved as `qmodel.pt`, and as the safetensors of its state dict."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from format_cases import FormatCase
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

UNSWEPT = patch("hqq.models.base.cleanup", lambda: None)  # whose gc.collect() takes a second each time


@UNSWEPT
def quantized(plain: Path, **options: Any) -> Any:
    """A model with HQQLinear layers, computing in fp32."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    devices = {path: "cpu" for path, _ in model.named_modules() if path}  # "cpu" alone fails for OPT
    AutoHQQHFModel.quantize_model(model, BaseQuantizeConfig(**options), compute_dtype=torch.float32, device=devices)
    return model


def write(plain: Path, out: Path, safetensors: bool = False, **options: Any) -> None:
    """Save a quantized model into the folder `out`."""
    from hqq.models.hf.base import AutoHQQHFModel

    model = quantized(plain, **options)
    out.mkdir()
    if not safetensors:
        AutoHQQHFModel.save_quantized(model, str(out))
        return
    settings = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
    model.config.architectures = [type(model).__name__]
    (out / "config.json").write_text(model.config.to_json_string())
    model.config.quantization_config = settings
    model.config.to_json_file(out / "config.json")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, out / "model.safetensors")


@UNSWEPT
def read(out: Path) -> Any:
    """The model as the library loads it; what it writes as safetensors, it reads through its layers' state dicts."""
    from hqq.core.quantize import HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    if (out / "qmodel.pt").is_file():
        return AutoHQQHFModel.from_quantized(str(out), compute_dtype=torch.float32, device="cpu")
    tensors = load_file(out / "model.safetensors")
    model = AutoHQQHFModel.create_model(str(out), {}).to_empty(device="cpu")
    for path in {name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")}:
        layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        state = {name.removeprefix(f"{path}."): t for name, t in tensors.items() if name.startswith(f"{path}.")}
        layer.load_state_dict({name: tensors.pop(f"{path}.{name}") for name in state})
        model.set_submodule(path, layer)
    rotary = getattr(model.model, "rotary_emb", None)
    if rotary is not None:
        model.model.rotary_emb = type(rotary)(model.config)
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if type(module).__name__ == "HQQLinear"}


def _scales(out: Path) -> dict[str, Tensor]:
    return {path: layer.meta["scale"] for path, layer in layers_of(read(out)).items()}


def _codes(out: Path) -> dict[str, Tensor]:
    if not (out / "qmodel.pt").is_file():
        tensors = load_file(out / "model.safetensors")
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(".scale")}
    state = torch.load(out / "qmodel.pt", weights_only=True)
    flat = {f"{path}.{name}": value for path, about in state.items() for name, value in about.items()}
    return {name: t for name, t in flat.items() if isinstance(t, Tensor) and not name.endswith(".scale")}


def _logits(out: Path, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return read(out)(input_ids).logits


def _case(name: str, family: str, **options: Any) -> FormatCase:
    return FormatCase(
        name=f"hqq-{name}",
        family=family,
        write=partial(write, **options),
        scales=_scales,
        logits=_logits,
        tolerance=1e-4,
        needs=("hqq",),
        codes=_codes,
    )


CASES = [
    _case("4", "llama", nbits=4, group_size=32, axis=1),
    _case("4-axis0", "opt", nbits=4, group_size=32, axis=0),
    _case("8", "opt", nbits=8, group_size=None, axis=1),
    _case("3", "llama", nbits=3, group_size=64, axis=1, view_as_float=True),
    _case("2-axis0", "llama", nbits=2, group_size=16, axis=0),
    _case("1", "llama", nbits=1, group_size=16, axis=1),
    _case("4-safetensors", "llama", nbits=4, group_size=32, axis=1, safetensors=True),
    _case("3-safetensors", "opt", nbits=3, group_size=32, axis=0, safetensors=True, view_as_float=True),
]
