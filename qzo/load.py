"""Reading models: GPTQ checkpoints as QuantLinear layers, everything else through transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qzo.checkpoint import FORMATS, QUANTIZE_CONFIG, WEIGHTS
from qzo.errors import QzoError
from qzo.linear import QuantLinear
from qzo.packing import zeros_from_v1
from qzo.walk import Site, find_sites, freeze, replace_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickles


def load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dequantize: bool = True,
) -> PreTrainedModel:
    """Load a causal language model.

    A GPTQ checkpoint (formats "gptq" and "gptq_v2", one file or shards, with or without act-order) becomes a model
    with QuantLinear layers, ready for `qzo.scales` and `qzo.QZO`. Anything else comes unquantized, ready for
    `qzo.quantize`. Only safetensors and GGUF files are read, and no code of a checkpoint is run.

    Args:
        source: a folder with config.json, a .gguf file, or a hub id, which is downloaded.
        dtype: of the unquantized tensors; None takes that of a GPTQ checkpoint's config, and bf16 for all else.
        device: where the tensors go.
        dequantize: of a .gguf file. False keeps its blocks packed, as GgufLinear layers, and trains their scales: for
            `qzo.scales` and `qzo.QZO`. Llama, Mistral and Qwen 2 and 3 files; Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have
            scales to train, Q4_K, Q5_K and Q6_K stay frozen.

    Raises:
        QzoError: nothing there, damaged or contradictory files, another quantization method.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise QzoError(f"{path} is not a file; give the path of a .gguf file")
        if not dequantize:
            from qzo.gguf_load import load_gguf

            return load_gguf(path, dtype or torch.bfloat16, torch.device(device))
        from transformers import GgufConfig

        from qzo.gguf_header import read_gguf_header

        read_gguf_header(path)  # a damaged one is told before anything believes it

        dense = GgufConfig(dequantize=True)  # unasked, transformers keeps weights packed where it has kernels
        return _from_pretrained(path.parent, dtype, device, gguf_file=path.name, quantization_config=dense)
    folder = path if path.is_dir() else _download(str(source))
    config = _read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and (folder / QUANTIZE_CONFIG).is_file():  # all that AutoGPTQ wrote at first
        quantization = {"quant_method": "gptq", **_read_json(folder / QUANTIZE_CONFIG)}
    if quantization is None:
        return _from_pretrained(folder, dtype, device)
    method = _either(quantization, "quant_method", "method") if isinstance(quantization, dict) else None
    if method != "gptq":
        raise QzoError(f'{folder}: quant_method="{method}" is not supported; give a GPTQ or an unquantized checkpoint')
    return _load_gptq(folder, quantization, dtype or _dtype(config), torch.device(device))


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of what `load` loads. Raises QzoError where there is none."""
    from transformers import AutoTokenizer

    path = Path(source)
    place, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})
    try:
        return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False, **options)
    except Exception as error:  # as in _from_pretrained
        raise QzoError(f"{source} has no tokenizer that loads: {one_line(error)}") from error


def _from_pretrained(folder: Path, dtype: torch.dtype | None, device: torch.device | str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    source = folder / options.get("gguf_file", "")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or torch.bfloat16,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # transformers raises many kinds; all of them mean that the folder cannot be used
        raise QzoError(f"{source}: {one_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would draw them at random
        raise QzoError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return model.to(device)


def _download(name: str) -> Path:
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        raise QzoError(f"{name} is not a folder; give a folder with config.json, a .gguf file or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # network, authorization, unknown name
        raise QzoError(f"{name} is neither a folder nor on the hub: {one_line(error)}") from error


def _load_gptq(folder: Path, quantization: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Build the model on meta, put QuantLinear layers in, and give every tensor its value file by file."""
    checkpoint_format = _either(quantization, "checkpoint_format", "format") or "gptq"
    if checkpoint_format not in FORMATS:
        raise QzoError(f'{folder}: checkpoint_format="{checkpoint_format}" is not supported; need gptq or gptq_v2')
    try:
        n_bits, group_size = int(quantization["bits"]), int(quantization["group_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise QzoError(f"{folder}: quantization_config must have whole numbers bits and group_size") from error
    files = _weight_files(folder)
    names = {name for file in files for name in _names(file)}
    model = _skeleton(folder, dtype)
    _insert_layers(model, names, n_bits, group_size)
    for file in files:
        _assign(model, file, n_bits, checkpoint_format, dtype, device)
    finish(model, device)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise QzoError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return freeze(model).eval()


def _skeleton(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as in _from_pretrained
        raise QzoError(f"{folder}: {one_line(error)}") from error


def _insert_layers(model: nn.Module, names: set[str], n_bits: int, group_size: int) -> None:
    """A QuantLinear for each layer whose codes are in the checkpoint, with a bias where that has one."""

    def stored(site: Site) -> bool:
        path = site.paths[0]
        return f"{path}.qweight" in names or f"{path}.gate_up_proj.0.qweight" in names

    def build(_: int, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        return QuantLinear.from_weight(weight, bias, n_bits, group_size)

    replace_sites(model, [site for site in find_sites(model) if stored(site)], build)
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.bias is None and f"{path}.bias" in names:
            bias = torch.empty(module.out_features, device="meta")
            module.bias = nn.Parameter(bias, requires_grad=False)


def _assign(
    model: nn.Module, file: Path, n_bits: int, checkpoint_format: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the tensors of one file to the model, which must expect each of them in this shape."""
    expected = model.state_dict()
    tensors = {}
    for name, tensor in _read(file, device):
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store what the config implies
            continue
        if name not in expected:
            raise QzoError(f"{file}: the model has no tensor {name}; config.json and weights do not belong together")
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            raise QzoError(
                f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but config.json implies "
                f"{wanted.dtype} {tuple(wanted.shape)}"
            )
        if name.endswith(".qzeros") and checkpoint_format == "gptq":
            tensor = zeros_from_v1(tensor, n_bits)
        elif tensor.is_floating_point() and not name.endswith(QUANTIZED_SUFFIXES):
            tensor = tensor.to(dtype)
        tensors[name] = tensor
    model.load_state_dict(tensors, strict=False, assign=True)
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear) and f"{path}.g_idx" in tensors:
            low, high = module.g_idx.aminmax()
            if low < 0 or high >= module.scales.shape[0]:
                raise QzoError(f"{file}: {path}.g_idx has values outside 0 ... {module.scales.shape[0] - 1}")


def finish(model: Any, device: torch.device, tie: bool = True) -> None:
    """Tie weights, and compute the buffers that no checkpoint holds (rotary tables, causal masks)."""
    if tie:
        model.tie_weights()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that _init_weights leaves it alone
    with torch.no_grad():
        for module in model.modules():
            unset = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for name in set(unset) & module._non_persistent_buffers_set:
                setattr(module, name, torch.empty_like(getattr(module, name), device=device))
            if unset:
                model._init_weights(module)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, whatever it is called, or those that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    files = list(folder.glob("*.safetensors"))
    if len(files) == 1 and not any(folder.glob("*.index.json")):  # AutoGPTQ: gptq_model-4bit-128g.safetensors
        return files
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        raise QzoError(f"{folder} has no {WEIGHTS} and no {index.name}; only safetensors files are read")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise QzoError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise QzoError(f"{index} names {name}, which is not a file in that folder")
    return [folder / name for name in names]


def _names(file: Path) -> list[str]:
    with _opened(file) as tensors:
        return list(tensors.keys())


def _read(file: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    with _opened(file, str(device)) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)


@contextmanager
def _opened(file: Path, device: str = "cpu") -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise QzoError(f"{file} is damaged: {one_line(error)}; copy or download it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QzoError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise QzoError(f"{file} does not hold a JSON object")
    return content


def _either(settings: dict[str, Any], *names: str) -> Any:
    """The value of the first of these names that is there: readers and writers disagree on what to call it."""
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config.json names, bf16 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise QzoError(f'dtype "{name}" in config.json is not a floating-point dtype of PyTorch')
    return dtype


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
