"""Reading models: quantized checkpoints by their formats' own readers, everything else through transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qzo.checkpoints.generation import read_generation
from qzo.checkpoints.save import writes_itself
from qzo.checkpoints.tokenizer import load_tokenizer as load_tokenizer
from qzo.errors import AGAIN, QzoError
from qzo.files.finite import check_made, check_model
from qzo.files.folder import download, headers_in, one_line, weight_files
from qzo.files.settings import Source, check_no_adapters, is_gguf, source_of
from qzo.formats.gguf.files import GgufCheckpoint
from qzo.formats.table import find
from qzo.models.build import auto_class, config_of
from qzo.models.causal import check_causal
from qzo.models.origin import Origin, note_origin
from qzo.models.skeleton import check_unquantized
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dequantize: bool = True,
    revision: str | None = None,
    tuned: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """Load a causal language model. `qzo.load` is this, and takes the folder of a run too.

    A quantized checkpoint, in one file or in shards, becomes a model with layers of its format, ready for `qzo.scales`
    and `qzo.QZO`; which formats there are, and what of each is read, stands in the README and with the packages of
    `qzo/formats`. An unquantized one comes as it is, ready for `qzo.quantize`. Only safetensors, GGUF files and the
    qmodel.pt of HQQ (tensors and settings alone) are read, and no code of a checkpoint is run.

    Args:
        source: a folder with config.json, a .gguf file, or a hub id, which is downloaded.
        dtype: of the unquantized tensors; None takes that of a quantized checkpoint's config, and bf16 for all else.
        device: where the tensors go.
        dequantize: of a .gguf file. False keeps its blocks packed, as GgufLinear layers, and trains their scales: for
            `qzo.scales` and `qzo.QZO`. Llama, Mistral, Mixtral, Qwen 2 and 3, dense and MoE, Gemma 1 to 3 and Phi-3;
            Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have scales to train, all other types (Q4_K, IQ4_XS, ...) stay frozen.
        revision: of a hub id, a branch, tag or commit: configuration, weights and generation config are all of it.
        tuned: of a .gguf file that is dequantized: name -> scales or offsets in the place of those in its blocks.

    A generation_config.json beside the weights is read for all formats. `model.save_pretrained` of a quantized model
    writes what `qzo.save` writes.

    Raises:
        QzoError: nothing there, damaged or contradictory files, another quantization method, a language model whose
            tokens see those after them (an encoder), and numbers that are NaN or infinite, of which all are looked at.
    """
    model: Any = _load(source, dtype, device, dequantize, revision, tuned or {})
    check_made(source, model)
    if model.name_or_path and Path(model.name_or_path).exists():  # a place, the same wherever the process goes next
        model.name_or_path = model.config.name_or_path = str(Path(model.name_or_path).absolute())
    return model


def _load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None,
    device: torch.device | str,
    dequantize: bool,
    revision: str | None,
    tuned: Mapping[str, Tensor],
) -> PreTrainedModel:
    path = Path(source)
    if revision is not None and path.exists():
        raise QzoError(f'revision="{revision}" is of a hub id, and {path} is on this machine; leave it out')
    if is_gguf(path):
        return _from_file(path, dtype, torch.device(device), dequantize, tuned)
    folder = path if path.is_dir() else download(str(source), revision)
    about = source_of(folder)
    read_generation(folder)  # before the weights
    check_no_adapters(about)
    found = find(about)
    if found is not None:
        return _packed(found.load(dtype, torch.device(device)), about)
    if about.settings is not None:
        raise QzoError(
            f'{folder}: quant_method="{about.method}" is not supported; give a checkpoint of a format that the README '
            "names, or an unquantized one"
        )
    check_unquantized(folder, about.config, headers_in(weight_files(folder)))
    model = _from_pretrained(folder, dtype, device)
    note_origin(model, Origin(folder.resolve()))
    return model


def _from_file(
    path: Path, dtype: torch.dtype | None, device: torch.device, dequantize: bool, tuned: Mapping[str, Tensor]
) -> Any:
    """A .gguf file, by `qzo.formats.gguf`; dequantized by transformers where its architecture is not known there."""
    if not path.is_file():
        raise QzoError(f"{path} is not a file; give the path of a .gguf file")
    file = GgufCheckpoint(path)
    if not dequantize:
        return _packed(file.load(dtype, device), source_of(path))
    model = file.dequantized(dtype, device, tuned)
    if model is None:
        from transformers import GgufConfig

        dense = GgufConfig(dequantize=True)  # unasked, transformers keeps weights packed where it has kernels
        model = _from_pretrained(path.parent, dtype, device, gguf_file=path.name, quantization_config=dense)
    note_origin(model, Origin(path.resolve()))
    return model


def _packed(model: Any, about: Source) -> Any:
    """A model on the codes of its files: it remembers them, reads its generation config, and saves itself."""
    note_origin(model, Origin(about.path.resolve(), packed=True, settings=about.settings))
    generation = read_generation(about.path)
    if generation is not None:
        model.generation_config = generation
    writes_itself(model)
    return model


def _from_pretrained(folder: Path, dtype: torch.dtype | None, device: torch.device | str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    source = folder / options.get("gguf_file", "")
    try:
        with quiet_libraries():
            kind: Any = AutoModelForCausalLM
            if "gguf_file" not in options:
                options["config"] = config_of(folder)
                kind = auto_class(options["config"])
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=dtype or torch.bfloat16,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers raises many kinds; all of them mean that the folder cannot be used
        raise QzoError(f"{source}: {one_line(error)}; {AGAIN}") from error
    model, report = loaded
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if "gguf_file" in options:  # all else was checked before it was built
        check_causal(source, model.config, model)
    if unexpected and "gguf_file" in options:
        raise QzoError(
            f"{source} has {unexpected[0]}, for which {type(model).__name__} has no place; take the model's "
            "safetensors files"
        )
    if missing:  # transformers would draw them at random
        raise QzoError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}; {AGAIN}")
    check_model(source, model)
    return model.to(device)
