"""MeZO and QZO as their authors' released code runs them: every expression makes new tensors, logits for all tokens.

Only what memory depends on is reproduced, from the public repositories princeton-nlp/MeZO (large_models/trainer.py and
utils.py) and maifoundations/QZO (large_language_models/, gptqmodel 1.7.2): fp16 weights and scales, no masters, noise
of the parameter's own size and dtype, a key-value cache in training, log-probabilities of every position, and 4-bit
layers that rebuild their whole weight. These methods are for comparison and no part of a default run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qzo
from bench.cases.case import BenchCase
from bench.cases.group_sizes import default_group_size
from bench.cases.text import IGNORED, Batch
from bench.methods.prepared import Enter, Prepared
from bench.methods.world import World
from qzo.formats.aqlm import layer as aqlm
from qzo.optim.noise import mix_seed
from qzo.quantizers.aqlm import quantize_random

CLIP_THRESHOLD = 100.0
LOWEST_SCALE = 1e-7
# Triton's do_bench clears a buffer before each timed launch, to empty the L2 cache (get_empty_cache_for_benchmark)
AUTOTUNE_BYTES = 256 << 20
UNDECAYED = ("bias", "layer_norm", "layernorm")  # parts of names


def mezo_reference(case: BenchCase, world: World) -> Prepared:
    """MeZO as released: fp16 weights, perturbed out of place, up to four temporaries of the largest tensor's size."""
    model = world.place(world.model(torch.float16)).eval()
    model.requires_grad_(False)
    groups = [{"params": list(model.named_parameters())}]
    return _prepared(model, OutOfPlace(groups, 1e-7, case.seed), "mezo-reference")


def qzo_reference(case: BenchCase, world: World) -> Prepared:
    """QZO as released: fp16 scales, perturbed out of place, each layer's weight rebuilt whole for its product."""
    base = world.model(torch.float16)
    group_size = case.group_size or default_group_size(base)
    qzo.quantize(base, n_bits=4, group_size=group_size)
    model = world.place(base).eval()
    tuned: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, qzo.QuantLinear):
            layer.forward = partial(whole_product, layer, tuned)  # type: ignore[method-assign]
    prepared = _prepared(model, OutOfPlace([_scales(model)], 1e-7, case.seed, CLIP_THRESHOLD), "qzo-reference")
    prepared.quantization = {"format": "gptq", "bits": 4, "group_size": group_size}
    return prepared


def qzo_2bit_reference(case: BenchCase, world: World) -> Prepared:
    """2-bit QZO as released: AQLM scales and all unquantized parts, embeddings included, perturbed out of place.

    The layers' products are those of `qzo-2bit`, in pieces: a whole weight stays far below the update's temporaries.
    """
    model = world.place(quantize_random(world.model(torch.float16), seed=case.seed)).eval()
    model.requires_grad_(False)
    groups = [{"params": list(model.named_parameters())}, _scales(model)]
    prepared = _prepared(model, OutOfPlace(groups, 1e-7, case.seed, CLIP_THRESHOLD), "qzo-2bit-reference")
    prepared.quantization = {"format": "aqlm-1x16", "bits": 2, "group_size": aqlm.GROUP_SIZE}
    prepared.notes.append("AQLM codes drawn at random: memory, not accuracy")
    return prepared


def _scales(model: nn.Module) -> dict[str, Any]:
    """The parameter group of a quantized model's scales."""
    return {"params": list(qzo.scales(model).items()), "lowest": LOWEST_SCALE}


class OutOfPlace(torch.optim.Optimizer):
    """SPSA by three perturbations, +eps, -2 eps, +eps, and an update, each `data = expression`: rounding drifts.

    Extra memory while one tensor of n bytes is moved: 3 n in a perturbation (z, the scaled z, and either its product
    with eps or the sum), in the update 4 n where weight decay is computed (it is, with a decay of 0), else 3 n.

    Args:
        groups: parameter groups of (name, tensor) pairs; all tensors are trained. The group option `lowest` is the
            smallest value that the update leaves, where weight decay is left out (scales); None for none.
        clip_threshold: bound of the directional derivative; None for none.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        seed: int,
        clip_threshold: float | None = None,
        eps: float = 1e-3,
    ) -> None:
        self.seed, self.steps, self.clip_threshold = seed, 0, clip_threshold
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0, "lowest": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], restored: Callable[[], None] = lambda: None) -> float:  # type: ignore[override]
        """Two evaluations of the loss, the way back and the update; returns the first loss, as the released code does.

        `restored` is called between the way back and the update.
        """
        eps = self.param_groups[0]["eps"]
        self._perturb(1)
        loss_plus = closure()
        self._perturb(-2)
        loss_minus = closure()
        derivative = float((loss_plus - loss_minus) / (2 * eps))
        self._perturb(1)
        restored()
        if self.clip_threshold is not None:
            derivative = min(max(-self.clip_threshold, derivative), self.clip_threshold)
        self._update(derivative)
        self.steps += 1
        return float(loss_plus)

    def _perturb(self, scaling: int) -> None:
        for index, group, _, tensor in self._tensors():
            z = self._noise(index, tensor)
            tensor.data = tensor.data + scaling * z * group["eps"]

    def _update(self, derivative: float) -> None:
        for index, group, name, tensor in self._tensors():
            rate, decay = group["lr"], group["weight_decay"]
            z = self._noise(index, tensor)
            if group["lowest"] is not None:
                tensor.data = torch.clamp(tensor.data - rate * (derivative * z), min=group["lowest"])
            elif any(part in name for part in UNDECAYED):
                tensor.data = tensor.data - rate * (derivative * z)
            else:
                tensor.data = tensor.data - rate * (derivative * z + decay * tensor.data)

    def _tensors(self) -> Iterator[tuple[int, dict[str, Any], str, Tensor]]:
        """(index over all groups, group, name, tensor)."""
        index = 0
        for group in self.param_groups:
            for name, tensor in zip(group["param_names"], group["params"], strict=True):
                yield index, group, name, tensor
                index += 1

    def _noise(self, index: int, tensor: Tensor) -> Tensor:
        """All of z in the tensor's shape and dtype; released: the global generator, seeded."""
        device = "cpu" if tensor.is_meta else tensor.device
        generator = torch.Generator(device).manual_seed(mix_seed(self.seed, self.steps, index))
        return torch.empty_like(tensor).normal_(generator=generator)


def whole_product(layer: qzo.QuantLinear, tuned: set[int], x: Tensor) -> Tensor:
    """x [..., K] times a weight that exists whole in x's dtype, as gptqmodel's Triton path makes it.

    On `meta` what that kernel allocates: the weight once, and for the first weight of each size (`tuned`) the buffer
    that Triton's autotuner holds while it compares launch settings. With data `dequantize`, which joins pieces and so
    holds the weight twice for a moment.
    """
    if x.is_meta:
        weight = x.new_empty(layer.out_features, layer.in_features)
        if weight.numel() not in tuned:
            tuned.add(weight.numel())
            x.new_empty(AUTOTUNE_BYTES, dtype=torch.uint8)
    else:
        weight = layer.dequantize(x.dtype)
    y = x @ weight.t()
    return y if layer.bias is None else y.add_(layer.bias)


def full_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood a token of each sequence's labels, from the log-probabilities of all positions."""
    output = model(input_ids=batch.input_ids, use_cache=True)
    logits = output.logits[..., :-1, :].contiguous()
    targets = batch.labels.clone()[..., 1:].contiguous()
    counted = targets != IGNORED
    log_probs = F.log_softmax(logits, dim=-1)
    picked = log_probs.gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return -((picked * counted).sum(-1) / counted.sum(-1)).mean()


def _prepared(model: nn.Module, optimizer: OutOfPlace, name: str) -> Prepared:
    def step(batch: Batch, enter: Enter) -> float:
        phases = iter(("forward-plus", "perturb", "forward-minus", "update"))

        def closure() -> Tensor:
            enter(next(phases))
            loss = full_loss(model, batch)
            enter(next(phases))
            return loss

        enter("perturb")
        loss = optimizer.step(closure, restored=lambda: enter("update"))
        enter("update")
        return loss

    return Prepared(model, optimizer, step, "float16", name, replaces_weights=True)
