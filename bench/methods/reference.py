"""MeZO and QZO as their authors' released code runs them: every expression makes new tensors, logits for all tokens.

Only what memory depends on is reproduced, from the public repositories princeton-nlp/MeZO (large_models/trainer.py and
utils.py) and maifoundations/QZO (large_language_models/, gptqmodel 1.7.2): fp16 weights and scales, no masters, noise of
the parameter's own size and dtype, a key-value cache in training, log-probabilities of every position, and 4-bit layers
that rebuild their whole weight. These methods are there for comparison and are not part of a default run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qzo
from bench.case import BenchCase
from bench.catalog import default_group_size
from bench.methods.prepared import Enter, Prepared
from bench.text import IGNORED, Batch
from bench.worlds import World
from qzo.noise import mix_seed

LOWEST_SCALE = 1e-7
UNDECAYED = ("bias", "layer_norm", "layernorm")  # parts of names


def mezo_reference(case: BenchCase, world: World) -> Prepared:
    """MeZO as released: fp16 weights, perturbed out of place, up to four temporaries of the largest tensor's size."""
    model = world.place(world.model(torch.float16)).eval()
    model.requires_grad_(False)
    return _prepared(model, OutOfPlace(model.named_parameters(), lr=1e-7, seed=case.seed), "mezo-reference")


def qzo_reference(case: BenchCase, world: World) -> Prepared:
    """QZO as released: fp16 scales, perturbed out of place, each layer's weight rebuilt whole for its product."""
    model = world.model(torch.float16)
    group_size = case.group_size or default_group_size(model)
    qzo.quantize(model, n_bits=4, group_size=group_size)
    model = world.place(model).eval()
    for layer in model.modules():
        if isinstance(layer, qzo.QuantLinear):
            layer.forward = partial(whole_product, layer)  # type: ignore[method-assign]
    optimizer = OutOfPlace(
        qzo.scales(model).items(), lr=1e-7, seed=case.seed, clip_threshold=100.0, lowest=LOWEST_SCALE
    )
    prepared = _prepared(model, optimizer, "qzo-reference")
    prepared.quantization = {"format": "gptq", "bits": 4, "group_size": group_size}
    return prepared


class OutOfPlace(torch.optim.Optimizer):
    """SPSA by three perturbations, +eps, -2 eps, +eps, and an update, each `data = expression`: rounding drifts.

    Extra memory while one tensor of n bytes is moved: 3 n in a perturbation (z, the scaled z, and either its product
    with eps or the sum), in the update 4 n where weight decay is computed (it is, with a decay of 0), else 3 n.

    Args:
        named: (name, tensor) pairs; all are trained.
        clip_threshold: bound of the directional derivative; None for none.
        lowest: smallest value that the update leaves, which also leaves weight decay out (scales); None for none.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        lr: float,
        seed: int,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        clip_threshold: float | None = None,
        lowest: float | None = None,
    ) -> None:
        self.seed, self.steps = seed, 0
        self.clip_threshold, self.lowest = clip_threshold, lowest
        super().__init__(list(named), {"lr": lr, "eps": eps, "weight_decay": weight_decay})

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
        for group in self.param_groups:
            for index, tensor in enumerate(group["params"]):
                z = self._noise(index, tensor)
                tensor.data = tensor.data + scaling * z * group["eps"]

    def _update(self, derivative: float) -> None:
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for index, (name, tensor) in enumerate(zip(group["param_names"], group["params"], strict=True)):
                z = self._noise(index, tensor)
                if self.lowest is not None:
                    tensor.data = torch.clamp(tensor.data - rate * (derivative * z), min=self.lowest)
                elif any(part in name for part in UNDECAYED):
                    tensor.data = tensor.data - rate * (derivative * z)
                else:
                    tensor.data = tensor.data - rate * (derivative * z + decay * tensor.data)

    def _noise(self, index: int, tensor: Tensor) -> Tensor:
        """All of z in the tensor's shape and dtype, from a private generator; the released code seeds the global one."""
        device = "cpu" if tensor.is_meta else tensor.device
        generator = torch.Generator(device).manual_seed(mix_seed(self.seed, self.steps, index))
        return torch.empty_like(tensor).normal_(generator=generator)


def whole_product(layer: qzo.QuantLinear, x: Tensor) -> Tensor:
    """x [..., K] times a weight that exists whole in x's dtype, as gptqmodel's Triton path makes it.

    On `meta` one allocation of the weight's size, as that kernel; with data `dequantize`, which joins pieces and so
    holds the weight twice for a moment.
    """
    if x.is_meta:
        weight = x.new_empty(layer.out_features, layer.in_features)
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
