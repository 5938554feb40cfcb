"""ZO2 (zo2/optimizer/mezo_sgd/zo2.py, model/huggingface/opt): MeZO on a model whose layers wait in the host's memory.

Each module is updated, perturbed and run for both sides before the next one; layers are uploaded in a stream of their
own, one ahead. Vocabulary, positions and the last norm stay on the GPU. Beside it zo.py, what it is compared with: the
same steps in place on a model that is there whole. Attention and masks are those of transformers 4.28.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from bench.cases.text import Batch
from bench.ledger.ledger import Ledger

DEFAULT, UPLOAD, COMPUTE = "load", "upload", "compute"  # streams, as phases of the ledger
STEPS = 2  # the first has no gradient to update by
UNDECAYED = ("bias", "layer_norm", "ln")  # parts of names
Pair = tuple[Tensor, Tensor]


def streamed_step(ledger: Ledger, model: Any, batch: Batch) -> None:
    """Two steps of an OPT model without data, whose weights the ledger has not seen."""
    decoder = model.model.decoder
    staying = [decoder.embed_tokens, decoder.embed_positions, decoder.final_layer_norm, model.lm_head]
    ledger.enter(DEFAULT)
    for module in staying:
        for parameter in module.parameters():
            ledger.see(parameter)
    ledger.see(batch.input_ids)
    for step in range(STEPS):
        _step(ledger, model, batch, update=step > 0)


def resident_steps(ledger: Ledger, model: Any, batch: Batch) -> None:
    """Two steps of zo.py, in place: both sides one after the other, the way back, the update."""
    for parameter in model.parameters():
        ledger.see(parameter)
    for _ in range(STEPS):
        for _ in range(2):
            _perturb(model)
            output = model(input_ids=batch.input_ids, use_cache=True)
            _loss(output.logits[..., :-1, :].contiguous(), batch)
            del output
        _perturb(model)
        for name, parameter in model.named_parameters():
            _update(name, parameter)


def _step(ledger: Ledger, model: Any, batch: Batch, update: bool) -> None:
    ledger.enter(COMPUTE)
    pair = _decoded(ledger, model.model.decoder, batch.input_ids, update)
    logits = _dual(model.lm_head, update, lambda module, hidden: module(hidden), pair)
    shifted = [item[..., :-1, :].contiguous() for item in logits]
    for item in shifted:
        _loss(item, batch)


def _decoded(ledger: Ledger, decoder: Any, ids: Tensor, update: bool) -> Pair:
    """The decoder's result of both sides; each has a mask of its own until then."""
    pair = _dual(decoder.embed_tokens, update, lambda module, _: module(ids), (ids, ids))
    mask, _other = (_mask(ids, pair[0].dtype) for _ in range(2))
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    placed = _dual(decoder.embed_positions, update, lambda module, _: _positions(module, positions), (ids, ids))
    pair = pair[0] + placed[0], pair[1] + placed[1]
    del placed
    layers = list(decoder.layers)
    _upload(ledger, layers[0])
    for index, layer in enumerate(layers):
        if index:
            _offload(layers[index - 1])
        ledger.enter(COMPUTE)
        pair = _dual(layer, update, lambda module, hidden: _first(module(hidden, attention_mask=mask)), pair)
        if index + 1 < len(layers):
            _upload(ledger, layers[index + 1])
    _offload(layers[-1])
    ledger.enter(COMPUTE)
    return _dual(decoder.final_layer_norm, update, lambda module, hidden: module(hidden), pair)


def _loss(shifted: Tensor, batch: Batch) -> None:
    F.cross_entropy(shifted.view(-1, shifted.shape[-1]), batch.labels[..., 1:].contiguous().view(-1))


def _mask(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T] in the model's dtype (modeling_opt.py, _prepare_decoder_attention_mask)."""
    batch, tokens = ids.shape
    causal = torch.full((tokens, tokens), 0.0, device=ids.device)
    causal = causal.masked_fill_(torch.ones_like(causal, dtype=torch.bool), 0.0).to(dtype)
    causal = causal[None, None].expand(batch, 1, tokens, tokens)
    told = torch.ones(batch, tokens, device=ids.device)[:, None, None].expand(batch, 1, tokens, tokens).to(dtype)
    inverted = 1.0 - told
    return inverted.masked_fill(inverted.to(torch.bool), 0.0) + causal


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _positions(module: Any, positions: Tensor) -> Tensor:
    return F.embedding(positions + module.offset, module.weight)


def _dual(module: nn.Module, update: bool, run: Callable[[Any, Tensor], Tensor], inputs: Pair) -> Pair:
    """`module_dual_forward`: an update by the step before, then both sides with their perturbations."""
    if update:
        for name, parameter in module.named_parameters():
            _update(name, parameter)
    _perturb(module)
    first = run(module, inputs[0])
    _perturb(module)
    second = run(module, inputs[1])
    _perturb(module)
    return first, second


def _perturb(module: nn.Module) -> None:
    for parameter in module.parameters():
        z = torch.empty_like(parameter).normal_()
        parameter.data.add_(1.0 * z * 1e-3)


def _update(name: str, parameter: Tensor) -> None:
    z = torch.empty_like(parameter).normal_()
    if any(part in name for part in UNDECAYED):
        parameter.data.sub_(1e-7 * 1.0 * z)
    else:
        parameter.data.sub_(1e-7 * (1.0 * z + 0.1 * parameter.data))


def _upload(ledger: Ledger, layer: nn.Module) -> None:
    ledger.enter(UPLOAD)
    for parameter in layer.parameters():
        parameter.data = torch.empty_like(parameter)


def _offload(layer: nn.Module) -> None:
    """Storages that nobody has seen take the place of those on the GPU, which end here."""
    with _disable_current_modes():
        for parameter in layer.parameters():
            parameter.data = torch.empty_like(parameter)
