"""A model by its files, or by the folder of a run: `qzo.load`, `qzo.inspect` and `qzo.load_tokenizer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qzo.checkpoints import inspect as of_files
from qzo.checkpoints import load as from_files
from qzo.checkpoints import tokenizer as beside_files
from qzo.checkpoints.write import check_numbers
from qzo.errors import QzoError
from qzo.training.tuned.state import Tuned, is_tuned, read_tuned

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qzo.models.inspection import Inspection

Place = str | os.PathLike[str]


def load(
    source: Place,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dequantize: bool = True,
    revision: str | None = None,
    model: Place | None = None,
) -> PreTrainedModel:
    """Load a causal language model, or what a run made of one.

    A quantized checkpoint, in one file or in shards, becomes a model with layers of its format, ready for `qzo.scales`
    and `qzo.QZO`; which formats there are, and what of each is read, stands in the README and with the packages of
    `qzo/formats`. An unquantized one comes as it is, ready for `qzo.quantize`. Only safetensors, GGUF files and the
    qmodel.pt of HQQ (tensors and settings alone) are read, and no code of a checkpoint is run.

    The folder of `qzo train`, or a checkpoint of `qzo.QZOTrainer`, gives what loading its export would give: the model
    it was begun on, found by the hash that was kept of it, with the tensors of the best state. Adapters (lora, qlora)
    are put on the model.

    Args:
        source: a folder with config.json, a .gguf file, or a hub id, which is downloaded; or the folder of a run.
        dtype: of the unquantized tensors; None takes that of the run, of a quantized checkpoint's config, and bf16 for
            all else.
        device: where the tensors go.
        dequantize: of a .gguf file. False keeps its blocks packed, as GgufLinear layers, and trains their scales: for
            `qzo.scales` and `qzo.QZO`. Llama, Mistral, Mixtral, Qwen 2 and 3, dense and MoE, Gemma 1 to 3 and Phi-3;
            Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have scales to train, all other types (Q4_K, IQ4_XS, ...) stay frozen.
        revision: of a hub id, a branch, tag or commit: configuration, weights and generation config are all of it.
        model: of a run, where its model lies now, if that moved.

    A generation_config.json beside the weights is read for all formats. `model.save_pretrained` of a quantized model
    writes what `qzo.save` writes.

    Raises:
        QzoError: nothing there, damaged or contradictory files, another quantization method, a language model whose
            tokens see those after them (an encoder), numbers that are NaN or infinite, of which all are looked at, and
            a run whose model is not there any more or is another one.
    """
    tuned = _tuned(source, model, revision)
    if tuned is None:
        return from_files.load(source, dtype, device, dequantize, revision)
    loaded: Any = tuned.load(dtype, device, dequantize)
    return loaded


def inspect(source: Place, model: Place | None = None) -> Inspection:
    """What a model's files hold, and whether QZO can train it, see `qzo.checkpoints.inspect`.

    Args:
        source: a folder with config.json, or a .gguf file; or the folder of a run, which stands for its model:
            the tuned tensors are looked through too.
        model: of a run, where its model lies now, if that moved.

    Raises QzoError for what is none of these, and for files that cannot be read.
    """
    tuned = _tuned(source, model)
    if tuned is None:
        return of_files.inspect(source)
    check_numbers(tuned.tensors)
    return of_files.inspect(tuned.model)


def load_tokenizer(source: Place, revision: str | None = None, model: Place | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of what `load` loads, with the same arguments. Raises QzoError where there is none."""
    tuned = _tuned(source, model, revision)
    return beside_files.load_tokenizer(source if tuned is None else tuned.model, revision)


def _tuned(source: Place, model: Place | None, revision: str | None = None) -> Tuned | None:
    """What a run became; None for a model. Raises QzoError for arguments of the other."""
    if not is_tuned(Path(source)):
        if model is not None:
            raise QzoError(f"{source} is a model; model= is for a run, whose model moved: leave it out")
        return None
    if revision is not None:
        raise QzoError(f'revision="{revision}" is of a hub id, and {source} is a run on this machine; leave it out')
    return read_tuned(Path(source), model=None if model is None else os.fspath(model))
