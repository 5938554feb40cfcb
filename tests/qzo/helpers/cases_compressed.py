"""compressed-tensors by its own library: its quantization and compression write, its decompression reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from format_cases import FormatCase
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

ALL = "Linear"


def group(n_bits: int, size: int | None = None, asymmetric: bool = False, **options: Any) -> dict[str, Any]:
    """A config group; size None is a scale for each row."""
    weights = {"num_bits": n_bits, "type": "int", "symmetric": not asymmetric, "strategy": "channel"}
    weights |= {} if size is None else {"strategy": "group", "group_size": size}
    form = options.pop("format", "pack-quantized")
    return {"targets": options.pop("targets", [ALL]), "weights": weights | options, "format": form}


def compressed(plain: Path, groups: list[dict[str, Any]], ignore: list[str], order: bool = False) -> tuple[Any, Any]:
    """A model in fp32 that the library has quantized to nearest and compressed, and its compressor.

    With `order` the columns of each weight are quantized in the order that `groups_of` names.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    config = QuantizationConfig.model_validate({"config_groups": named, "ignore": ignore})
    apply_quantization_config(model, config, show_progress=False)
    for module in layers_of(model).values():
        settings = module.quantization_scheme.weights
        if order:
            module.weight.data = module.weight.data[:, groups_of(module, settings.group_size).argsort(stable=True)]
        weight = module.weight.data
        if settings.strategy == "tensor":
            low, high = (bound.view(1) for bound in weight.aminmax())
        else:
            low, high = weight.unflatten(1, (-1, settings.group_size or weight.shape[1])).aminmax(dim=2)
        scale, zero = calculate_qparams(low, high, settings)
        module.weight_scale.data.copy_(scale)
        module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return model, compressor


def write(
    groups: list[dict[str, Any]], plain: Path, out: Path, ignore: tuple[str, ...] = ("lm_head",), order: bool = False
) -> None:
    """Save such a model into the folder `out`."""
    model, compressor = compressed(plain, groups, list(ignore), order)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    if order:
        _in_own_order(model, out)


def groups_of(module: Any, size: int) -> Tensor:
    """The group of each column of a layer, drawn at random, int32 [K]."""
    columns = torch.randperm(module.in_features, generator=torch.Generator().manual_seed(module.in_features))
    return (columns // size).int()


def _in_own_order(model: nn.Module, out: Path) -> None:
    """Make of a checkpoint with sorted columns what the library wrote up to 2026 for actorder "group"."""
    tensors = load_file(out / "model.safetensors")
    for path, module in layers_of(model).items():
        g_idx = groups_of(module, module.quantization_scheme.weights.group_size)
        _reorder(tensors, path, g_idx.argsort(stable=True).argsort())
        tensors[f"{path}.weight_g_idx"] = g_idx
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    for own in config["quantization_config"]["config_groups"].values():
        own["weights"]["actorder"] = "group"
    (out / "config.json").write_text(json.dumps(config))


def _reorder(tensors: dict[str, Tensor], path: str, order: Tensor) -> None:
    """Packed codes of 4 bits with their columns in another order."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    shape = torch.Size(tensors[f"{path}.weight_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{path}.weight_packed"], 4, shape)
    tensors[f"{path}.weight_packed"] = pack_to_int32(codes[:, order].contiguous(), 4)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Path -> module that the library quantizes."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "quantization_scheme")}


def read(out: Path) -> Any:
    """The model with the weights of the library's decompression, in fp32."""
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.utils import replace_direct_state_dict

    config = AutoConfig.from_pretrained(out)
    settings = config.quantization_config
    del config.quantization_config
    for own in settings["config_groups"].values():
        own["weights"].pop("actorder", None)  # "group" is refused
    tensors = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    apply_quantization_config(model, QuantizationConfig.model_validate(settings), show_progress=False)
    for path, module in layers_of(model).items():
        own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")}
        order = own.pop(f"{path}.weight_g_idx", torch.zeros(module.in_features)).argsort(stable=True)
        if order[-1] != module.in_features - 1 or bool((order.diff() != 1).any()):
            _reorder(own, path, order)
        parts = {name.removeprefix(f"{path}."): tensor for name, tensor in own.items()}
        replace_direct_state_dict(module, {"bias": None, **parts})
        decompress_module(module)
        module.weight.data = module.weight.data.float()[:, order.argsort()]
    model.load_state_dict(tensors, strict=False)
    if "lm_head" not in layers_of(model):
        model.tie_weights()
    return model


def _scales(out: Path) -> dict[str, Tensor]:
    tensors = load_file(out / "model.safetensors")
    return {
        name.removesuffix(".weight_scale"): tensor for name, tensor in tensors.items() if name.endswith("weight_scale")
    }


def _logits(out: Path, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return read(out)(input_ids).logits


def _case(name: str, family: str, *groups: dict[str, Any], **options: Any) -> FormatCase:
    return FormatCase(
        name=f"compressed-{name}",
        family=family,
        write=partial(write, list(groups), **options),
        scales=_scales,
        logits=_logits,
        tolerance=1e-4,
        needs=("compressed_tensors",),
    )


MIXED = (
    group(8, targets=["re:.*layers\\.0\\.mlp\\.", "model.layers.1.mlp.up_proj"], format="naive-quantized"),
    group(2, 16, asymmetric=True, targets=["re:.*v_proj$"]),
    group(8, strategy="tensor", asymmetric=True, targets=["re:.*k_proj$"]),
    group(4, 32),
)
CASES = [
    _case("w4", "llama", group(4, 32)),
    _case("w4-asymmetric", "opt", group(4, 32, asymmetric=True)),
    _case("w8", "opt", group(8)),
    _case("w8-asymmetric", "llama", group(8, asymmetric=True)),
    _case("int8", "llama", group(8, format="int-quantized")),
    _case("naive8-asymmetric", "opt", group(8, 32, asymmetric=True, format="naive-quantized")),
    _case("g_idx", "llama", group(4, 32, asymmetric=True), order=True),
    _case("mixed", "llama", *MIXED, ignore=("lm_head", "re:.*\\.1\\.self_attn\\.o_proj", "model.layers.0.mlp.up_proj")),
]
