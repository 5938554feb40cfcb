"""AQLM checkpoints made of the `aqlm` library's own modules, and read by transformers with that library."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from format_cases import FormatCase
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHAPES = {"1x16": (1, 16, 8), "2x8": (2, 8, 8)}  # codebooks, bits of a code, weights to a code


def quantized(linear: nn.Linear, codebooks: int, nbits: int, group: int, dtype=torch.float16) -> nn.Module:
    """A module of the library with random codes and codebooks, and the weight's scales: the format, not the model."""
    from aqlm import QuantizedLinear
    from aqlm.utils import pack_int_data

    rows, columns = linear.weight.shape
    module = QuantizedLinear(
        columns, rows, group, 1, codebooks, nbits, bias=linear.bias is not None, dtype=dtype, device="cpu"
    )
    module.codebooks.data.normal_(std=codebooks**-0.5)
    codes = torch.randint(2**nbits, module.codes.shape)
    module.codes.data = pack_int_data(codes, nbits).clone()  # a clone, since it is made in inference mode
    rms = linear.weight.detach().square().mean(1).sqrt()
    module.scales.data.copy_(2 * rms.view(-1, 1, 1, 1))  # twice, so that these few scales have a say in the loss
    if linear.bias is not None:
        module.bias.data.copy_(linear.bias.detach())
    return module


def write(plain: Path, out: Path, shape: str = "2x8", skip: tuple[str, ...] = (), dtype=torch.float16) -> Path:
    """`plain` with the library's tensors in the place of its linear layers' weights, seeded."""
    from transformers import AutoModelForCausalLM

    codebooks, nbits, group = SHAPES[shape]
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    head = model.get_output_embeddings()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head and not any(part in path for part in skip):
                model.set_submodule(path, quantized(module, codebooks, nbits, group, dtype))
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    config = json.loads(model.config.to_json_string(use_diff=True)) | {"dtype": str(dtype).removeprefix("torch.")}
    config["quantization_config"] = {
        "quant_method": "aqlm",
        "in_group_size": group,
        "out_group_size": 1,
        "num_codebooks": codebooks,
        "nbits_per_codebook": nbits,
        "linear_weights_not_to_quantize": ["lm_head", *skip],
    }
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def scales(out: Path) -> dict[str, Tensor]:
    """Layer path -> scales, of the file."""
    tensors = load_file(out / "model.safetensors")
    return {name.removesuffix(".scales"): t.float() for name, t in tensors.items() if name.endswith(".scales")}


def logits(out: Path, input_ids: Tensor) -> Tensor:
    """What transformers and the library compute in fp32, by the library's kernel that needs neither CUDA nor numba."""
    from aqlm import QuantizedLinear
    from aqlm.inference_kernels.dequantization import dequantize_gemm
    from transformers import AutoModelForCausalLM

    def forward(layer, x):
        return dequantize_gemm(x, layer.codes, layer.codebooks, layer.scales, layer.bias)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.forward = partial(forward, module)
    with torch.no_grad():
        return model(input_ids).logits


CASES = [
    FormatCase(f"aqlm-{shape}", family, partial(write, shape=shape), scales, logits, needs=("aqlm", "accelerate"))
    for shape in SHAPES
    for family in ("llama", "opt")
]
