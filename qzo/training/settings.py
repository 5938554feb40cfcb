"""What a training run is told, with every default, checked before any work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from qzo.errors import QzoError
from qzo.optim.estimator import NOISE, SIDES, Estimator, usual_of

# lr and C of a method where none is given: of the paper, of MeZO's, and what is usual for AdamW
DEFAULTS: dict[str, tuple[float, float]] = {
    "qzo": (1e-7, 100.0),
    "mezo": (1e-6, math.inf),
    "lora": (1e-4, math.inf),
    "qlora": (1e-4, math.inf),
    "ft": (1e-5, math.inf),
}
METHODS = tuple(DEFAULTS)
ZEROTH_ORDER = ("qzo", "mezo")
QUANTIZED = ("qzo", "qlora")  # methods that need a quantized model; the others need an unquantized one
UPDATES: dict[str, dict[str, Any]] = {"sgd": {}, "momentum": {"momentum": 0.9}, "adam": {"betas": (0.9, 0.999)}}
AUTO = "auto"  # a value that is chosen before the first step, by forward passes or the data, see `qzo.training.auto`
MEASURED = ("lr", "eps", "clip_threshold")
AUTOMATIC = (*MEASURED, "layers", "batch_size")  # what may be it
SCHEDULERS = ("constant", "linear", "cosine")
DTYPES = ("bfloat16", "float16", "float32")
EXAMPLES = {"lr": 1e-6, "eps": 1e-3, "clip_threshold": 100}
MAY_CHANGE = ("steps", "legs", "patience", "eval_batch_size")  # on a resume
EVAL_BATCH_SIZE = 16


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are those of the command line.

    Args:
        method: "qzo" the scales of a quantized model, "mezo" all weights of an unquantized one, both without
            gradients; "lora" and "qlora" adapters on the two kinds of model, "ft" all weights, by AdamW.
        steps: in all, not more of them after a resume.
        batch_size: examples a step; "auto", as suits the length of rows.
        max_length: tokens of a prompt with its answer; the text of a longer one is cut at its beginning. None, as many
            as the model has positions.
        lr: None, the method's: 1e-7 for qzo (the paper's, for 7B; a smaller model has fewer scales and needs more),
            1e-6 for mezo, 1e-4 for adapters, 1e-5 for ft. "auto", qzo with relative and sgd only: as measured before
            the first step, and halved where losses rise.
        eps, relative, clip_threshold, directions: of `qzo.QZO`; those that a method has no use for must be left alone.
            clip_threshold None is the method's, 100 for qzo and none for mezo; inf is none. eps and clip_threshold may
            be "auto" as lr may.
        estimator: zeroth order only: "two-sided" as in the paper, 2 evaluations a direction; "one-sided" takes them
            against one common evaluation, so that n directions cost n + 1.
            "population" takes each against the mean of the others, so that n directions cost n.
        normalize: zeroth order only: divide d by the spread of the losses over the directions of a step, whatever size
            they have; a step then moves each number by about lr / (eps sqrt(directions)).
        noise: zeroth order only: "generator", z of PyTorch's own; "philox", the same z on every device, so that a run's
            journal replays on any, see `qzo.QZO`.
        centering: share of the label words' mean over the batch that the loss leaves out, see `qzo.tasks.loss`.
        update: qzo only: "sgd" as in the paper, "momentum" 0.9, or "adam" with betas 0.9 and 0.999.
        scheduler: of the learning rate over `steps`: "constant", "linear" down to 0, or half a "cosine" down to 0.
        legs: steps at which the lr came to an end before the run was given more of them; behind each it begins anew.
        eval_batch_size: examples that a validation, and the test at the end, run together.
        eval_every: steps between validations; there is one before the first step and one after the last as well.
        patience: validations without a new best before training stops; None, never.
        layers: zeroth order only: "14-24" trains what is in these decoder layers, counted from 0; None, everything;
            "auto", a part that suits the kind of data (qzo).
        seed: of the order of the data, of the split, of z, and of new adapters.
        dtype: "bfloat16", "float16" or "float32": of the unquantized tensors, and so of the arithmetic. None takes
            float32 for ft, else what `qzo.load` chooses.
        preset: where the settings came from that were not given by hand; changes nothing.

    Raises QzoError for a value out of range and an option that the method has no use for.
    """

    method: str = "qzo"
    steps: int = 1000
    batch_size: int | str = 16
    max_length: int | None = None
    lr: float | str | None = None
    eps: float | str = 1e-3
    relative: bool = False
    clip_threshold: float | str | None = None
    directions: int = 1
    estimator: str = "two-sided"
    normalize: bool = False
    noise: str = "generator"
    centering: float = 0.0
    update: str = "sgd"
    scheduler: str = "constant"
    eval_batch_size: int = EVAL_BATCH_SIZE
    eval_every: int = 100
    patience: int | None = None
    layers: str | None = None
    seed: int = 0
    dtype: str | None = None
    preset: str = "paper"
    legs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS,
            "update": tuple(UPDATES),
            "scheduler": SCHEDULERS,
            "dtype": (None, *DTYPES),
            "estimator": SIDES,
            "noise": tuple(NOISE),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise QzoError(f'{name}="{getattr(self, name)}" is not known; choose {", ".join(filter(None, known))}')
        lr, clip_threshold = DEFAULTS[self.method]
        object.__setattr__(self, "lr", lr if self.lr is None else self.lr)
        object.__setattr__(
            self, "clip_threshold", clip_threshold if self.clip_threshold is None else self.clip_threshold
        )
        for name in ("lr", "eps", "clip_threshold"):
            value = getattr(self, name)
            if value == AUTO:
                continue
            if isinstance(value, str) or not value > 0 or (name != "clip_threshold" and math.isinf(value)):
                raise QzoError(f"{name}={value} is not a positive number; choose e.g. {EXAMPLES[name]}")
        for name in ("steps", "batch_size", "max_length", "directions", "eval_batch_size", "eval_every", "patience"):
            value = getattr(self, name)
            if name == "batch_size" and value == AUTO:
                continue
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise QzoError(f"{name}={value} is not a positive whole number; choose e.g. 8")
        if not 0 <= self.centering < 1:
            raise QzoError(f"centering={self.centering} is not in [0, 1); choose e.g. 0.7, or 0 for none")
        if list(self.legs) != sorted(set(self.legs)) or not all(0 < end < self.steps for end in self.legs):
            raise QzoError(
                f"legs={self.legs} are not growing numbers of steps below {self.steps}; restore run.json from a copy"
            )
        self._check_method()
        self._check_estimator()
        _ = self.layer_range

    @property
    def layer_range(self) -> tuple[int, int] | None:
        """First and last decoder layer that is trained; None, everything, or not chosen yet. Raises QzoError."""
        if self.layers is None:
            return None
        if self.layers == AUTO:
            return None
        first, _, last = self.layers.partition("-")
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise QzoError(f'layers="{self.layers}" is not a range of decoder layers; choose e.g. 14-24, or auto')
        return int(first), int(last)

    def _check_method(self) -> None:
        """Options that a method would silently ignore."""
        unused: dict[str, tuple[str, ...]] = {"update": ("qzo",), "relative": ("qzo",)}
        unused |= dict.fromkeys(("eps", "directions", "estimator", "normalize", "noise", "layers"), ZEROTH_ORDER)
        for name, methods in unused.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and self.method not in methods:
                raise QzoError(
                    f'{name}={getattr(self, name)} is for {" and ".join(methods)}, not for "{self.method}"; leave it '
                    "out"
                )
        if measured := [name for name in (*MEASURED, "layers") if getattr(self, name) == AUTO]:
            needs = {"method": "qzo", "relative": True, **({"update": "sgd"} if "lr" in measured else {})}
            wrong = [f"{name}={getattr(self, name)}" for name, value in needs.items() if getattr(self, name) != value]
            if wrong:
                raise QzoError(
                    f'{measured[0]}="auto" is for qzo with relative amounts and the update sgd, not for '
                    f"{', '.join(wrong)}; give a number, or --preset paper"
                )
        if self.method not in ZEROTH_ORDER and not math.isinf(self.clip_threshold or 0):  # type: ignore[arg-type]
            raise QzoError(
                f'clip_threshold={self.clip_threshold} is for qzo and mezo, not for "{self.method}"; leave it out'
            )

    def _check_estimator(self) -> None:
        """Ways to measure d that do not fit together."""
        Estimator(self.directions, usual_of(self.noise), self.estimator, self.normalize, self.noise)

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, which counts from 0: a function of the step, so a resume needs no state."""
        assert isinstance(self.lr, int | float)
        return self.lr * self.schedule(step)

    def schedule(self, step: int) -> float:
        """The share of lr that step `step` is taken with."""
        ends = (*self.legs, self.steps)
        leg = next((number for number, end in enumerate(ends) if step < end), len(ends) - 1)
        begun = ends[leg - 1] if leg else 0
        done = (step - begun) / (ends[leg] - begun)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.scheduler]

    @property
    def undecided(self) -> bool:
        """Whether a value is still to be chosen."""
        return any(getattr(self, name) == AUTO for name in AUTOMATIC)

    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of `qzo.QZO` or `qzo.MeZO`."""
        clip = self.clip_threshold
        clip = None if clip is None or (isinstance(clip, float) and math.isinf(clip)) else clip
        common = {"lr": self.lr, "eps": self.eps, "clip_threshold": clip, "seed": self.seed}
        own = {"relative": self.relative, **UPDATES[self.update]} if self.method == "qzo" else {}
        measured = {name: getattr(self, name) for name in ("directions", "estimator", "normalize", "noise")}
        return {**common, **measured, **own}

    def to_json(self) -> dict[str, Any]:
        """Name -> value as JSON holds it; no clipping is null."""
        values = asdict(self)
        clip = values["clip_threshold"]
        clip = None if isinstance(clip, float) and math.isinf(clip) else clip
        return {**values, "clip_threshold": clip, "legs": list(self.legs)}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> dict[str, Any]:
        """What `to_json` wrote, as arguments; what is not known here is left out."""
        values = {name: saved[name] for name in TrainSettings.__dataclass_fields__ if name in saved}
        for name in ("lr", "eps"):  # as an option has them: no operator takes a whole number of any size
            values |= {name: float(values[name])} if type(values.get(name)) is int else {}
        clip = math.inf if values.get("clip_threshold") is None else values["clip_threshold"]
        return {**values, "clip_threshold": clip, "legs": tuple(values.get("legs", ()))}

    def as_begun(self, saved: dict[str, Any]) -> TrainSettings:
        """These settings as a run goes on with them that was begun with others, as JSON.

        What a run of an older version did, where it could not be asked for; and where it gets more steps than its lr
        was to fall over, that of the steps to come falls from its height once more.
        """
        older = {name: value for name, value in _before(saved).items() if getattr(self, name) == _default(name)}
        legs, planned = saved.get("legs", []), saved.get("steps")
        if self.scheduler != "constant" and isinstance(legs, list) and isinstance(planned, int):
            older["legs"] = (*legs, *([planned] if self.steps > planned else ()))
        return replace(self, **older)

    def check_resume(self, saved: dict[str, Any]) -> None:
        """Raise QzoError where a run was begun with other settings than these, but for those that may change."""
        own, saved = self.to_json(), {**_before(saved), **saved}
        planned = saved.get("steps", self.steps)
        if self.scheduler != "constant" and self.steps < planned:
            raise QzoError(
                f"the lr of the run falls over {planned:,} steps, so it cannot end after {self.steps:,}; give --steps "
                f"{planned} or more, or leave it out"
            )
        if self.legs != self.as_begun(saved).legs:
            raise QzoError(f"the run was begun with legs={saved.get('legs', [])}; take its settings by `as_begun`")
        for field in fields(self):  # a run of an older version lacks the newer settings
            name, begun = field.name, saved.get(field.name, field.default)
            if begun != own[name] and name not in MAY_CHANGE:
                raise QzoError(f"the run was begun with {name}={begun}, not {own[name]}; give the same")


def known(found: Any) -> dict[str, Any]:
    """What a run's file says was chosen, of the names that can be; others are not looked at."""
    return {name: found[name] for name in AUTOMATIC if isinstance(found, dict) and name in found}


def _default(name: str) -> Any:
    return TrainSettings.__dataclass_fields__[name].default


def _before(saved: dict[str, Any]) -> dict[str, Any]:
    """What a run did that was begun before these settings were there."""
    older = {"max_length": 256, "eval_batch_size": saved.get("batch_size", _default("batch_size"))}
    return {name: value for name, value in older.items() if name not in saved}
