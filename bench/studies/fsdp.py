"""Full fine-tuning with AdamW under FSDP, simulated for one of N ranks: the same step on meta tensors, sharded.

Follows torch.distributed.fsdp.FullyShardedDataParallel (_flat_param.py, _runtime_utils.py): each decoder layer is a
unit with one flat parameter, everything else is the root unit. A rank keeps 1/N of each flat parameter, of its gradient
and of its moments. The whole flat parameter exists from the unit's all-gather until it is resharded; backward makes the
whole flat gradient, which reduce-scatter turns into the rank's part. Not counted: NCCL's own buffers, which are outside
PyTorch's allocator, and that its streams do not share free blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import gpus
from bench.cases.case import BenchCase, choose
from bench.cases.models import resolve
from bench.ledger.ledger import Block, Ledger
from bench.methods.optimizers.adamw import MixedAdamW, fused_adamw
from bench.simulator.allocator.replay import ROUND_BYTES, replay
from bench.simulator.cuda.attention import attention_of
from bench.simulator.cuda.kernels import CudaFunctions, rules
from bench.worlds.sim import SimWorld
from bench.worlds.watch import WATCHED_STEPS
from qzo.errors import QzoError

LR = 1e-5
MODES = ("full-shard", "shard-grad-op")
IN_FLIGHT = 2  # freed gathers that may still be in use before the next one waits (_FreeEventQueue)


@dataclass(frozen=True)
class Precision:
    """Dtypes of a rank's shards and of the gathered parameters, and how AdamW is made for the shards."""

    shard: torch.dtype
    gathered: torch.dtype
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    bytes_per_parameter: int  # of weights, gradients and moments together, before dividing by N


def _foreach_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, foreach=True)


def _fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return fused_adamw(parameters, lr=LR)


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, torch.bfloat16, _fused, 8),
    "bf16-foreach": Precision(torch.bfloat16, torch.bfloat16, _foreach_adamw, 8),
    "mixed": Precision(torch.bfloat16, torch.bfloat16, lambda parameters: MixedAdamW(parameters, lr=LR), 12),
    "amp": Precision(torch.float32, torch.bfloat16, _fused, 16),
    "amp-foreach": Precision(torch.float32, torch.bfloat16, _foreach_adamw, 16),
}


@dataclass(frozen=True)
class FsdpSetting:
    """How the training is sharded.

    Attributes:
        gpus: number of ranks N. 1 is FSDP's NO_SHARD: nothing is gathered unless the dtype changes.
        mode: "full-shard" reshards a layer after its forward; "shard-grad-op" keeps it until its backward is over.
        precision: name from `PRECISIONS`. "bf16": weights, gradients and moments in bf16. "mixed": fp32 moments.
            "amp": fp32 shards gathered as bf16 (MixedPrecision(param_dtype=bf16)), fp32 gradients and moments.
            "-foreach": torch's default AdamW on a GPU, whose temporaries are as large as one moment; else fused.
        prefetch: gather the next layer before a layer's backward (BackwardPrefetch.BACKWARD_PRE, torch's default).
    """

    gpus: int
    mode: str = "full-shard"
    precision: str = "mixed"
    prefetch: bool = True

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise QzoError(f"gpus={self.gpus} is too small; it must be at least 1")
        choose("FSDP mode", self.mode, MODES)
        choose("FSDP precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class FsdpPeak:
    """Peak bytes of one rank over two steps: allocated with its roles, reserved, process, and live bytes by phase.

    `allocated` counts whole blocks; roles and phases are the ledger's, without what is too small to be split off.

    All ranks are alike (shards are padded to the same size), so N times these is the sum over the GPUs.
    """

    allocated: int
    reserved: int
    process: int
    at_peak: dict[str, int]
    phases: dict[str, int]


def simulate(
    model: str, setting: FsdpSetting, batch_size: int = 1, seq_len: int = 128, gpu: str = "a100-80gb"
) -> FsdpPeak:
    """Two training steps of one rank, the second with the optimizer's state there; batch and tokens are a rank's own.

    Raises:
        QzoError: unknown model or GPU, or sizes that a case refuses.
    """
    card = gpus.get(gpu)
    case = BenchCase(model, "ft-mixed", gpu=gpu, batch_size=batch_size, seq_len=seq_len)
    source = resolve(model)
    attention = attention_of(case, source, card.compute_capability)
    precision = PRECISIONS[setting.precision]
    world = SimWorld(source, attention)
    network = world.model(precision.gathered).train()
    ledger = Ledger("meta", ROUND_BYTES, rules(card))
    rank = Rank(network, setting, ledger)
    tokens = torch.empty(batch_size, seq_len, dtype=torch.long, device="meta")
    with ledger, CudaFunctions(attention, card.compute_capability):
        for _ in range(WATCHED_STEPS):
            rank.step(tokens)
    replayed = replay(ledger)
    peak = ledger.peak([name for name in ledger.phases if name != "load"])
    return FsdpPeak(
        replayed.peak_allocated, replayed.peak_reserved, replayed.peak_reserved + card.context_bytes(),
        peak.roles, ledger.phase_peaks(),
    )  # fmt: skip


class Unit:
    """One flat parameter: the part that a rank keeps, and the whole one while it is gathered."""

    def __init__(self, owners: list[tuple[nn.Module, str, nn.Parameter]], setting: FsdpSetting, ledger: Ledger) -> None:
        precision = PRECISIONS[setting.precision]
        self.ledger, self.setting, self.precision = ledger, setting, precision
        self.owners = owners
        shapes = {id(parameter): parameter.shape for _, _, parameter in owners}  # a tied parameter once
        self.order, self.shapes = list(shapes), list(shapes.values())
        self.numel = sum(shape.numel() for shape in self.shapes)
        self.padded = -(-self.numel // setting.gpus) * setting.gpus
        self.shard = nn.Parameter(torch.empty(self.padded // setting.gpus, dtype=precision.shard, device="meta"))
        ledger.assign("weights", [self.shard])
        self.gathered: Block | None = None
        # FSDP resizes this storage to nothing and back; here `gathered` stands for its bytes
        self.flat = torch.empty(self.numel, dtype=precision.gathered, device="meta", requires_grad=True)
        ledger.adopt(self.flat, Block(0, "weights"))
        for module, name, _ in owners:
            del module._parameters[name]

    @property
    def changes_dtype(self) -> bool:
        """Whether the gathered parameter has another dtype than the shards."""
        return self.precision.shard != self.precision.gathered

    def gather(self) -> None:
        """All-gather: a low-precision copy of the shard where dtypes differ, then the whole flat parameter."""
        if self.gathered is not None or (self.setting.gpus == 1 and not self.changes_dtype):
            return
        itemsize = self.precision.gathered.itemsize
        copy = None
        if self.changes_dtype and self.setting.gpus > 1:
            copy = self.ledger.allocate(self.shard.numel() * itemsize)
        self.gathered = self.ledger.allocate(self.padded * itemsize)
        if copy is not None:
            self.ledger.release(copy)

    def use(self) -> None:
        """Point the modules at views of the flat parameter, which is a leaf of the graph."""
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        views = {key: part.view(shape) for key, part, shape in zip(self.order, parts, self.shapes, strict=True)}
        for module, name, parameter in self.owners:
            setattr(module, name, views[id(parameter)])

    def reduce(self) -> None:
        """Reduce-scatter: the whole flat gradient becomes the rank's part, in the dtype of the shards."""
        whole = self.flat.grad
        assert whole is not None
        self.flat.grad = None
        self.ledger.assign("gradients", [whole])
        if self.setting.gpus == 1:
            part = whole
        else:
            even = nn.functional.pad(whole, (0, self.padded - self.numel)) if self.padded > self.numel else whole
            part = even.new_empty(self.shard.numel())
            del even
        self.shard.grad = part.to(self.precision.shard)
        self.ledger.assign("gradients", [self.shard.grad])


class Rank:
    """A model cut into units, with the hooks that gather, reshard and reduce them."""

    def __init__(self, network: nn.Module, setting: FsdpSetting, ledger: Ledger) -> None:
        self.network, self.setting, self.ledger = network, setting, ledger
        layers = decoder_layers(network)
        self.layers = [Unit(_parameters(layer), setting, ledger) for layer in layers]
        self.root = Unit(_parameters(network), setting, ledger)  # what the layers left over
        for buffer in network.buffers():
            ledger.see(buffer)
        self.units = [*self.layers, self.root]
        self.optimizer = PRECISIONS[setting.precision].optimizer([unit.shard for unit in self.units])
        self._freed: deque[Block] = deque()
        for index, layer in enumerate(layers):
            self._watch(index, layer)
        for unit in self.units:
            unit.flat.register_post_accumulate_grad_hook(lambda _, unit=unit: self._after_backward(unit))

    def step(self, tokens: Tensor) -> None:
        """One training step of this rank on tokens [batch_size, seq_len]."""
        self.ledger.enter("forward")
        self.root.gather()
        self.root.use()
        loss = self.network(input_ids=tokens, labels=tokens, use_cache=False).loss
        self.ledger.enter("backward")
        loss.backward()
        self._forget(keep=0)
        self.ledger.enter("step")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state = self.optimizer.state.values()
        self.ledger.assign("optimizer", [item for part in state for item in part.values() if isinstance(item, Tensor)])

    def _watch(self, index: int, layer: nn.Module) -> None:
        unit = self.layers[index]

        def before(*_: Any) -> None:
            self._gather(unit)
            unit.use()

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda _: self._before_backward(index))
            if self.setting.mode == "full-shard":
                self._free(unit)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def _before_backward(self, index: int) -> None:
        self._gather(self.layers[index])
        if self.setting.prefetch and index > 0:
            self._gather(self.layers[index - 1])

    def _after_backward(self, unit: Unit) -> None:
        self._free(unit)
        unit.reduce()

    def _gather(self, unit: Unit) -> None:
        if unit.gathered is None:
            self._forget(keep=IN_FLIGHT - 1)
            unit.gather()

    def _free(self, unit: Unit) -> None:
        """Give the gathered parameter back; the allocator gets it when the stream that used it is done with it."""
        if unit.gathered is not None:
            self._freed.append(unit.gathered)
            unit.gathered = None

    def _forget(self, keep: int) -> None:
        while len(self._freed) > keep:
            self.ledger.release(self._freed.popleft())


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """The children of the model's outermost nn.ModuleList; QzoError for a model without one."""
    holder = next((module for module in network.modules() if isinstance(module, nn.ModuleList)), None)
    if holder is None:
        raise QzoError(f"{type(network).__name__} has no list of layers that FSDP could wrap; take a decoder model")
    return list(holder)


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, name, parameter) of all that is below, a tied parameter once for each owner."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
