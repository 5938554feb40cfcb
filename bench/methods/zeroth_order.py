"""Methods that learn from forward passes alone: MeZO, and QZO in three sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import qzo
from bench.cases.case import BenchCase
from bench.cases.group_sizes import default_group_size
from bench.cases.quantizations import FOLLOW, FORMATS, quantize_as
from bench.cases.text import Batch
from bench.methods.prepared import Enter, Prepared
from bench.methods.world import World
from qzo.formats.aqlm import layer as aqlm
from qzo.live.scales import has_signed_scales
from qzo.live.trainable import offsets
from qzo.quantizers.aqlm import quantize_random

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPS = 1e-3
LABELS_AT_END = 1  # a batch asks for the last token of each sequence


def mezo(case: BenchCase, world: World) -> Prepared:
    """SPSA on all bf16 weights, in place, without the undo list that qzo.MeZO offers for an exact restore."""
    model = world.place(world.model(torch.bfloat16)).eval()
    model.requires_grad_(False)
    optimizer = qzo.MeZO(model.named_parameters(), lr=1e-6, eps=1e-3, seed=case.seed, exact=False, noise=case.noise)
    return _prepared(model, optimizer, "mezo")


def qzo_4bit(case: BenchCase, world: World) -> Prepared:
    """4-bit linear layers, embeddings, head and norms in bf16, as in the paper; the scales are trained."""
    return _quantized(case, world, embeddings=None)


def qzo_full(case: BenchCase, world: World) -> Prepared:
    """As `qzo`, with embeddings and head in 8 bits."""
    prepared = _quantized(case, world, embeddings=8)
    prepared.notes.append("embeddings and head in 8 bits")
    return prepared


def qzo_2bit(case: BenchCase, world: World) -> Prepared:
    """AQLM 1x16: 16-bit codes for groups of 8 weights, one codebook a layer; the channel-wise scales are trained."""
    model = quantize_random(world.model(torch.bfloat16), seed=case.seed)
    prepared = _trained_scales(world.place(model), case)
    prepared.quantization = {"format": "aqlm-1x16", "bits": 2, "group_size": aqlm.GROUP_SIZE}
    prepared.notes.append("AQLM codes drawn at random: memory, not accuracy")
    return prepared


def _quantized(case: BenchCase, world: World, embeddings: int | None) -> Prepared:
    model = world.model(torch.bfloat16)
    if case.quantization is not None:
        return _quantized_as(case, world, model, case.quantization, embeddings is not None)
    group_size = case.group_size or default_group_size(model)
    qzo.quantize(model, n_bits=4, group_size=group_size, embeddings=embeddings)
    prepared = _trained_scales(world.place(model), case)
    prepared.quantization = {"format": "gptq", "bits": 4, "group_size": group_size}
    return prepared


def _quantized_as(case: BenchCase, world: World, model: PreTrainedModel, name: str, embeddings: bool) -> Prepared:
    """In a format of `bench.cases.quantizations`. What a scale is differs, so all are moved by relative amounts.

    Where a format has offsets, they follow their scales as in `qzo train`, for 8 bytes a scale more.
    """
    about = quantize_as(model, name, case.group_size, case.seed, embeddings)
    signed = has_signed_scales(model)  # before there may be fake tensors, which tell nothing
    placed = world.place(model).eval()
    group: dict[str, Any] = {"params": qzo.scales(placed, vocabulary=True)}
    group |= {"offsets": {}} if case.still_offsets else {}
    optimizer = qzo.QZO(
        [group], lr=1e-7, eps=EPS, seed=case.seed, relative=True, nonnegative=not signed, noise=case.noise
    )
    prepared = _prepared(placed, optimizer, "qzo")
    follow = not case.still_offsets and bool(offsets(placed))
    prepared.quantization = about | ({"offsets": FOLLOW} if follow else {})
    note = FORMATS[name].note
    prepared.notes += [note] if note else []
    return prepared


def _trained_scales(model: nn.Module, case: BenchCase) -> Prepared:
    """QZO with the paper's settings; scales of 8-bit codes are 17 times smaller, and so is their eps."""
    model.eval()
    scales = qzo.scales(model, vocabulary=True)
    fine = {name for name in scales if getattr(model.get_submodule(name.rpartition(".")[0]), "n_bits", 4) == 8}
    groups = [
        {"params": {name: scale for name, scale in scales.items() if (name in fine) is small}, "eps": eps}
        for small, eps in ((False, EPS), (True, EPS * 15 / 255))
    ]
    groups = [group for group in groups if group["params"]]
    return _prepared(model, qzo.QZO(groups, lr=1e-7, seed=case.seed, noise=case.noise), "qzo")


def _prepared(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> Prepared:
    def step(batch: Batch, enter: Enter) -> float:
        phases = iter(("forward-plus", "perturb", "forward-minus", "update"))

        def closure() -> torch.Tensor:
            enter(next(phases))
            loss = qzo.label_loss(model, batch.input_ids, batch.labels, keep=LABELS_AT_END)
            enter(next(phases))
            return loss

        enter("perturb")
        return float(optimizer.step(closure))  # type: ignore[arg-type]

    return Prepared(model, optimizer, step, "bfloat16", name)
