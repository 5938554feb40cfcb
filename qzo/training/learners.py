"""What a training loop drives: an optimizer of either order, and how its state outlives the process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qzo.durable import read_tensors, write_tensors
from qzo.errors import QzoError
from qzo.journal.journal import Journal
from qzo.live.adapters import adapters, put_adapters
from qzo.live.scales import in_layers, quantized_layers, scales
from qzo.live.trainable import scale_group
from qzo.models.towers import of_text
from qzo.models.walk import freeze
from qzo.optim.guards import eps
from qzo.optim.mezo import MeZO
from qzo.optim.qzo import QZO
from qzo.optim.ranks import Ranks
from qzo.optim.spsa import SpsaOptimizer, live_tensors
from qzo.training.settings import QUANTIZED as NEED_QUANTIZED
from qzo.training.settings import ZEROTH_ORDER, TrainSettings

JOURNAL, LAST = "run.journal", "last.safetensors"
SNAPSHOT_EVERY = 200
GRADIENT_NORM = 1.0
MAX_SKIPPED = 10


@dataclass(frozen=True)
class Outcome:
    """What a step saw: its loss, d (zeroth order) or the norm of the gradient, and what became of it."""

    loss: float
    slope: float
    clipped: bool
    skipped: bool


class ZerothOrder:
    """A `qzo.QZO` or `qzo.MeZO` with a journal in the run's folder, where it goes on at the journal's end."""

    slope_name = "d"

    def __init__(self, model: nn.Module, optimizer: SpsaOptimizer, folder: Path) -> None:
        self.optimizer = optimizer
        if isinstance(optimizer, QZO):
            optimizer.foresees = False  # the loop does, see qzo.training.telemetry.prospect
        self.journal = Journal(folder / JOURNAL, model, optimizer, snapshot_every=SNAPSHOT_EVERY)
        self.notices = _resume(self.journal)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.optimizer.steps

    @property
    def skipped(self) -> int:
        """Steps left out because a loss was not finite."""
        return self.optimizer.skipped_steps

    def tensors(self) -> dict[str, Tensor]:
        """Name -> live tensor, of all that is trained."""
        return live_tensors(self.optimizer)

    def step(self, loss: Callable[[], Tensor], lr: float) -> Outcome:
        """Take a step; `record` it before the next. Raises QzoError as `SpsaOptimizer.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        value = self.optimizer.step(loss)
        last = self.optimizer.last
        assert last is not None
        return Outcome(value, last.directional_derivative, last.clipped, last.skipped)

    def mark(self) -> dict[str, str]:
        """The journal's checksum after the last step, which tells that a state is of this run."""
        return {"crc": self.journal.checksum}

    def record(self, save: bool = False) -> None:
        """Write the step's line into the journal, with `save` down to the disk. Raises QzoError where that is full."""
        self.journal.record()
        if save:
            self.journal.sync()

    def save(self) -> int:
        """Have on the disk what a resume needs; returns the step that it goes on after."""
        self.journal.sync()
        return self.journal.steps

    def close(self) -> None:
        """Sync and release the journal."""
        self.journal.close()


class FirstOrder:
    """AdamW on `named`; trained tensors and moments are saved when asked, and taken up again from there."""

    slope_name = "gradient_norm"

    def __init__(self, named: dict[str, Tensor], lr: float, folder: Path) -> None:
        self.named, self.path = named, folder / LAST
        self.optimizer = torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.0)
        self.steps = self.skipped = self.in_a_row = 0
        self.saved = 0  # step of the state on disk
        self.moving = False  # in an update, so that the tensors are neither of one step nor of the next
        self.notices: list[str] = []
        if self.path.exists():
            self._load()

    def tensors(self) -> dict[str, Tensor]:
        """Name -> live tensor, of all that is trained."""
        return {name: tensor.detach() for name, tensor in self.named.items()}

    def step(self, loss: Callable[[], Tensor], lr: float) -> Outcome:
        """One step of AdamW, the gradient's norm limited to 1. A loss or gradient that is not finite skips the step.

        Raises QzoError for the tenth of these in a row.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        graph = loss()
        graph.backward()
        value = float(graph.detach())
        norm = float(nn.utils.clip_grad_norm_(self.named.values(), GRADIENT_NORM))
        outcome = Outcome(value, norm, norm > GRADIENT_NORM, skipped=not math.isfinite(value + norm))
        if not outcome.skipped:
            self.moving = True
            self.optimizer.step()
        elif self.in_a_row + 1 == MAX_SKIPPED:
            raise QzoError(
                f"the loss was not finite for {MAX_SKIPPED} steps in a row, up to step {self.steps}; "
                "lower lr, look at the data, or take another --dtype where it is float16"
            )
        self.steps += 1
        self.skipped += outcome.skipped
        self.in_a_row = self.in_a_row + 1 if outcome.skipped else 0
        self.moving = False
        return outcome

    def record(self, save: bool = False) -> None:
        """Replace the saved state by the present one where `save` is set. Raises QzoError where the disk is full."""
        if save:
            self.save()

    def save(self) -> int:
        """Have on the disk what a resume needs, unless a step was cut in its midst; returns the step it goes on after.

        Raises QzoError where the disk is full.
        """
        if self.moving:
            return self.saved
        parts = {f"value.{name}": tensor for name, tensor in self.tensors().items()}
        for name, tensor in self.named.items():
            parts |= {f"{key}.{name}": value for key, value in self.optimizer.state[tensor].items()}
        metadata = {key: str(getattr(self, key)) for key in ("steps", "skipped", "in_a_row")}
        write_tensors(self.path, parts, metadata)
        self.saved = self.steps
        return self.saved

    def mark(self) -> dict[str, str]:
        """Nothing: there is no journal."""
        return {}

    @torch.no_grad()
    def _load(self) -> None:
        tensors, metadata = read_tensors(self.path)
        if {name.removeprefix("value.") for name in tensors if name.startswith("value.")} != set(self.named):
            raise QzoError(f"{self.path} is of another model or method; give what the run was begun with")
        for name, tensor in self.named.items():
            tensor.copy_(tensors[f"value.{name}"])
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if f"{key}.{name}" in tensors:  # none before the first step that was not skipped
                    saved = tensors[f"{key}.{name}"]
                    self.optimizer.state[tensor][key] = saved if key == "step" else saved.to(tensor.device)
        try:
            self.steps, self.skipped, self.in_a_row = (int(metadata[key]) for key in ("steps", "skipped", "in_a_row"))
        except (KeyError, ValueError) as error:
            raise QzoError(
                f"{self.path} does not say after how many steps it was saved; restore it from a copy"
            ) from error
        self.saved = self.steps

    def close(self) -> None:
        """Nothing is held open."""


Learner = ZerothOrder | FirstOrder


def make_learner(
    model: nn.Module, settings: TrainSettings, folder: Path, source: str = "MODEL", ranks: Ranks | None = None
) -> Learner:
    """The optimizer of a method on `model`, gone on from what `folder` holds.

    Changes the model: adapters are put in, `requires_grad` is set, and a resumed state is written into it.

    Args:
        model: as loaded; without dropout, or in eval mode, so that a step can be repeated to the bit.
        settings: method and options.
        folder: of the run; must exist.
        source: what to call the model in an error.
        ranks: that take each step together, of a zeroth-order method.

    Raises QzoError for a model of the wrong kind and a folder with a run of another model.
    """
    check_model(model, settings, source)
    if settings.method in ZEROTH_ORDER:
        freeze(model)
        return ZerothOrder(model, _zeroth_order(model, settings, ranks), folder)
    if settings.method == "ft":
        freeze(model)
        named: dict[str, Tensor] = {**of_text(model, dict(model.named_parameters()))}
        for tensor in named.values():
            tensor.requires_grad_(True)
    else:
        put_adapters(model, settings.seed)
        named = adapters(model)
    assert isinstance(settings.lr, float)
    return FirstOrder(named, settings.lr, folder)


def _zeroth_order(model: nn.Module, settings: TrainSettings, ranks: Ranks | None) -> SpsaOptimizer:
    """QZO or MeZO; in offset formats each offset follows its scale, which is the paper's Δ ⊙ W_int."""
    named, options = trained(model, settings), settings.optimizer_options()
    if settings.method == "mezo":
        return MeZO(named, **options, ranks=ranks)
    return QZO([scale_group(model, named)], **options, ranks=ranks)


def trained(model: nn.Module, settings: TrainSettings) -> dict[str, Tensor]:
    """Name -> live tensor, of what a zeroth-order method trains: for QZO, the scales of linear layers."""
    if settings.method == "qzo":
        return scales(model, settings.layer_range)
    named: dict[str, Tensor] = {**of_text(model, dict(model.named_parameters()))}
    return named if settings.layer_range is None else in_layers(named, *settings.layer_range)


def check_model(model: nn.Module, settings: TrainSettings, source: str) -> None:
    """Raise QzoError for a model that a method cannot train, and for layers that it does not have."""
    _check_kind(model, settings.method, source)
    if settings.layer_range is not None or settings.method == "qzo":
        trained(model, settings)


def check_eps(model: nn.Module, settings: TrainSettings) -> None:
    """Raise QzoError for an eps that is larger than the scales that would be trained; QZO says so too, but later."""
    if settings.method == "qzo" and not isinstance(settings.eps, str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as QZO warns
            eps.check_eps(trained(model, settings).items(), settings.eps, settings.relative)


def _check_kind(model: nn.Module, method: str, source: str) -> None:
    """Quantized where the method needs that, and not where it needs that."""
    quantized = bool(quantized_layers(model))
    if method in NEED_QUANTIZED and not quantized:
        raise QzoError(f"{source} is not quantized, and {method} needs that; first run: qzo quantize {source} OUT")
    if method not in NEED_QUANTIZED and quantized:
        other = {"mezo": "qzo", "lora": "qlora", "ft": "qzo or qlora"}[method]
        raise QzoError(f"{source} is quantized, and {method} needs an unquantized model; choose method {other}")


def _resume(journal: Journal) -> list[str]:
    """Take the run up; what the journal would warn of is returned."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            journal.resume()
    except BaseException:
        journal.close()
        raise
    return [str(warning.message) for warning in caught]
