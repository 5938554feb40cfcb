"""The models the bench knows: a name, folder, .gguf file or hub id becomes a `ModelSource`, and that an empty model.

`models.json` holds the architectures. Nothing is downloaded for them: `build_empty` makes a model on device meta, exact
in its shapes and free of memory. Only a hub id reaches for the network, and only for its config.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants

from bench.cases import catalog
from bench.cases.messages import one_line
from bench.cases.pretrained import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    transformers,
)
from qzo.errors import QzoError

ATTENTIONS = ("sdpa", "eager")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HINT = "python -m bench list models"
ANOTHER = "name another model"


@dataclass(frozen=True)
class ModelSource:
    """Where a model's architecture and, if there are any, its weights come from.

    `name` is safe as a folder name. `parameters` is the published count, tied weights once, None where none is known.
    `hub` is the id under which the architecture was published. `weights` is a folder, a .gguf file, a hub id (str), or
    None for an architecture alone.
    """

    name: str
    config: PreTrainedConfig
    parameters: int | None = None
    hub: str | None = None
    weights: Path | str | None = None


def resolve(model: str) -> ModelSource:
    """The source that MODEL names: a catalog name, a folder with a config.json, a .gguf file or a hub id.

    A catalog name wins over a folder of the same name (write `./name` for the folder). Code that comes with a model is
    never run. Raises QzoError for an unknown name, a broken config or file, or what is no causal language model.
    """
    if model in catalog.names():
        return _from_catalog(model)
    path = os.path.expanduser(model)
    if model.lower().endswith(".gguf"):
        return _from_gguf(Path(path))
    if os.path.isdir(path):
        return _from_folder(Path(path))
    if os.path.isfile(path):
        raise QzoError(f"model {model!r} is a file but no .gguf; give the folder that holds its config.json")
    if HUB_ID.fullmatch(model):
        return _from_hub(model)
    near = difflib.get_close_matches(model.lower(), catalog.names(), n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    raise QzoError(f"unknown model {model!r}: no catalog name, folder, .gguf file or hub id{nearest} (see `{HINT}`)")


def build_empty(source: ModelSource, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The model on device meta: shapes and dtypes without memory, tied weights tied, in training mode, without a cache.

    `source.config` is copied, not changed. Raises QzoError for an unknown or unsupported attention, a config that does
    not build, and a parameter count other than the published one.
    """
    check_attention(source, attention)
    config = copy.deepcopy(source.config)
    config.get_text_config().use_cache = False
    try:
        with torch.device("meta"):  # transformers 5 draws no initial weights on meta and ties the tied ones
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except Exception as error:
        raise QzoError(
            f"the config of {source.name} does not build: {one_line(error)}; correct it, or take another version of "
            "transformers"
        ) from error
    if not all(parameter.is_meta for parameter in model.parameters()):  # torch.normal asks nobody (DiffLlama)
        model.to("meta")
    check_parameters(source, model)
    return model.train()


def check_attention(source: ModelSource, attention: str) -> None:
    """Raise QzoError unless this architecture has the attention in transformers."""
    if attention not in ATTENTIONS:
        raise QzoError(f"attention={attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if attention == "sdpa" and not supports_sdpa(source):
        raise QzoError(
            f"{source.name}: transformers {transformers.__version__} has no faithful sdpa attention for "
            f"model_type={source.config.model_type!r}; choose attention='eager'"
        )


def check_parameters(source: ModelSource, model: PreTrainedModel) -> None:
    """Raise QzoError unless the model has as many parameters, tied ones counted once, as `source` says."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if source.parameters is not None and total != source.parameters:
        raise QzoError(
            f"{source.name} builds with {total:,} parameters under transformers {transformers.__version__}, "
            f"published are {source.parameters:,}; correct bench/cases/models.json or use another transformers"
        )


def supports_sdpa(source: ModelSource) -> bool:
    """Whether this architecture computes the same with SDPA; Gemma-2 caps its attention scores, which SDPA cannot."""
    if getattr(source.config.get_text_config(), "attn_logit_softcapping", None):
        return False  # transformers before 5.23 offers SDPA and leaves the cap out
    return bool(_model_class(source.config)._supports_sdpa)


def _from_catalog(name: str) -> ModelSource:
    entry = catalog.entry(name)
    return ModelSource(name, AutoConfig.for_model(**entry.config), entry.parameters, entry.hub, entry.weights)


def _from_gguf(path: Path) -> ModelSource:
    from qzo.formats.gguf.header import read_gguf_header  # needs gguf, which is not on every machine

    read_gguf_header(path)
    config = _load_config(str(path), str(path.parent), gguf_file=path.name)
    return ModelSource(_folder_name(path.stem), _causal(config, str(path)), weights=path)


def _from_folder(folder: Path) -> ModelSource:
    file = folder / "config.json"
    if not file.is_file():
        raise QzoError(
            f"folder {folder} has no config.json; a model's folder needs one: add it (the weights are optional)"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise QzoError(f"{file} is not valid JSON ({one_line(error)}); write it anew with save_pretrained") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise QzoError(
            f"{file} has model_type={model_type!r}, which transformers {transformers.__version__} does not know; "
            f"it must be a type that transformers ships (code beside a model is never run), such as 'llama'"
        )
    config = _causal(_load_config(str(file), str(folder)), str(file))
    has_weights = any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES)
    return ModelSource(_folder_name(folder.resolve().name), config, weights=folder if has_weights else None)


def _from_hub(hub: str) -> ModelSource:
    reachable = _hub_is_reachable()
    try:
        config = _load_config(hub, hub, local_files_only=not reachable)
    except QzoError as error:
        reason = str(error).removesuffix(f"; {ANOTHER}") if reachable else f"the hub cannot be reached for the id {hub}"
        remedy = f"check the spelling and the network, or give a folder with a config.json or a name of `{HINT}`"
        raise QzoError(f"no folder {hub} here, and {reason}; {remedy}") from error
    return ModelSource(_folder_name(hub), _causal(config, hub), hub=hub, weights=hub)


def _hub_is_reachable() -> bool:
    """False at once where the hub's host has no address; its client would try for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) or os.environ.get(name.lower()) for name in ("HTTPS_PROXY", "ALL_PROXY")):
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def _load_config(origin: str, *place: str, **options: Any) -> PreTrainedConfig:
    """AutoConfig, with one line for whatever goes wrong."""
    try:
        return AutoConfig.from_pretrained(*place, trust_remote_code=False, **options)
    except Exception as error:
        raise QzoError(f"no usable config in {origin}: {one_line(error)}; {ANOTHER}") from error


def _causal(config: PreTrainedConfig, origin: str) -> PreTrainedConfig:
    """The config, if it is a causal language model's."""
    remedy = "give a causal language model, such as a llama"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise QzoError(f"{origin} has model_type={config.model_type!r}, no causal language model; {remedy}")
    expected = _model_class(config).__name__
    if config.architectures and expected not in config.architectures:
        raise QzoError(f"{origin} has architectures={config.architectures} without {expected}; {remedy}")
    try:
        config.get_text_config()
    except ValueError as error:
        raise QzoError(
            f"{origin} has model_type={config.model_type!r}, several models of text in one; {remedy}"
        ) from error
    return config


def _model_class(config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _folder_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "--", text, flags=re.ASCII).strip(".-") or "model"
