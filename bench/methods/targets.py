"""Which layers get adapters: those that queries and values come from, under whatever name a model has them.

Queries and values may be one matrix with keys, or come out of a low rank (latent attention), or not be there at all:
then PEFT's own choice for the model is taken, else the matrix that a state-space mixer begins with, else every linear
layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qzo.errors import QzoError
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERY = ("q_proj", "query", "query_proj", "project_q", "q_lin", "Wq", "q", "query_key", "q_b_proj", "q_gate_proj")
VALUE = ("v_proj", "value", "value_proj", "project_v", "v_lin", "Wv", "v", "v_proj_current", "v_proj_delayed",
         "kv_b_proj", "kv_proj")  # fmt: skip
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj_qkv", "in_proj_qkvz")
MIXER = "in_proj"
WRAPPED = "linear"  # a layer inside a module that bears the projection's name


def adapter_targets(model: PreTrainedModel) -> list[str]:
    """Names of layers as PEFT's `target_modules` takes them: ends of paths, or whole paths where an end would also
    match a layer outside the language model (a vision tower).

    Raises QzoError for a model without linear layers.
    """
    paths = linear_paths(model)
    prefix = _decoder_prefix(model)
    inside = [path for path in paths if path.startswith(prefix)] or paths
    names = _attention(inside) or _of_peft(model, inside) or _mixer(inside) or sorted({_name(path) for path in inside})
    if not names:
        raise QzoError(f"{type(model).__name__} has no linear layer that adapters could go to; choose another method")
    if any(_name(path) in names for path in set(paths) - set(inside)):
        return [path for path in inside if _name(path) in names]
    return names


def linear_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers that adapters may go to, quantized ones and GPT-2's `Conv1D` among them, without the
    output head.
    """
    from bench.cases.pretrained import Conv1D

    head = model.get_output_embeddings()
    return [
        path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _attention(paths: list[str]) -> list[str]:
    """Query and value, or the matrix that both are in, of all modules that have them."""
    names: set[str] = set()
    for children in _siblings(paths).values():
        fused = children & set(FUSED)
        query, value = children & set(QUERY), children & set(VALUE)
        names |= fused or (query | value if query and value else set())
    wrapped = {_name(path) for path in paths} - {path.rpartition(".")[2] for path in paths}
    by_role = {name.removesuffix(f".{WRAPPED}"): name for name in wrapped}
    order = (*QUERY, *VALUE, *FUSED)
    return [by_role.get(name, name) for name in sorted(names, key=order.index)]


def _siblings(paths: list[str]) -> dict[str, set[str]]:
    """Path of a module -> names of the projections in it."""
    found: dict[str, set[str]] = {}
    for path in paths:
        parent, _, name = path.removesuffix(f".{WRAPPED}").rpartition(".")
        found.setdefault(parent, set()).add(name)
    return found


def _of_peft(model: PreTrainedModel, paths: list[str]) -> list[str]:
    with quiet_libraries():
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES
    chosen = CHOICES.get(model.config.model_type, [])
    there = {_name(path) for path in paths}
    return [name for name in chosen if name in there] if isinstance(chosen, list) else []


def _mixer(paths: list[str]) -> list[str]:
    return [MIXER] if any(_name(path) == MIXER for path in paths) else []


def _name(path: str) -> str:
    """The end of a path that tells which layer of a kind it is."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1] == WRAPPED else parts[-1:])


def _decoder_prefix(model: PreTrainedModel) -> str:
    """How paths inside the language model begin; empty where the model does not tell it apart."""
    decoder = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    return f"{path}." if path else ""
