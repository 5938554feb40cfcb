"""Settings from one end of the numbers to the other: no number becomes infinite, and what an error claims is true.

    python tests/attack/attack_extreme.py [MANY]

MANY optimizers, QZO on scales, on scales with offsets, and MeZO, with lr, eps, the bound of d, the dtype, the steepness
of the loss and all other options drawn at random, take up to STEPS steps, in some of which the loss is no number. After
each all numbers are finite; a skipped step has changed none; and where an error says that the weights are those of the
last good step, or untouched, they are, to the bit. Then MANY / 20 runs of `qzo train`, with extreme options too.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import figures
import standin
import torch
from crash_works import works
from crashes import alive
from tiny import Tiny
from torch import Tensor

import qzo
from qzo.commands.main import main as command
from qzo.durable import read_tensors

STEPS = 14  # more than are skipped before an error
WRONG = ("infinite", "changed_by_a_skip", "false_claims", "tracebacks", "more_than_a_line")
KINDS = ("scales", "offsets", "MeZO", "classic MeZO")


def power(dice: random.Random, low: float, high: float) -> float:
    """A number whose logarithm is drawn evenly."""
    return float(10 ** dice.uniform(low, high))


def options_of(dice: random.Random, kind: str) -> dict[str, Any]:
    """Options of an optimizer, most of them far from what anyone would take."""
    directions, estimator = dice.choice([1, 1, 3]), dice.choice(["two-sided", "one-sided"])
    made: dict[str, Any] = {
        "lr": dice.choice([power(dice, -45, 300), power(dice, -8, 8), 0.0]),
        "eps": dice.choice([power(dice, -45, 40), power(dice, -5, 0)]),
        "clip_threshold": dice.choice([None, 100.0, power(dice, -45, 300)]),
        "directions": directions,
        "distribution": dice.choice(["gaussian", "rademacher"]),
        "estimator": estimator,
        "normalize": directions > 1 and estimator == "one-sided" and dice.random() < 0.5,
        "max_skipped": dice.choice([1, 3, 10, None]),
        "seed": dice.randrange(2**31),
    }
    if "MeZO" in kind:
        return {**made, "exact": kind == "MeZO"}
    rule = dice.choice([{}, {}, {"momentum": 0.9}, {"betas": (0.9, 0.999)}, {"betas": (0.0, 0.0)}])
    return {**made, **rule, "relative": dice.random() < 0.3, "adam_eps": dice.choice([1e-8, power(dice, -40, 0)])}


def numbers_of(model: Tiny, optimizer: Any, kind: str) -> dict[str, Tensor]:
    """Copies of all that an optimizer moves, and of what it starts its next step from."""
    live = qzo.scales(model) if "MeZO" not in kind else dict(model.named_parameters())
    tensors = {**optimizer.truth(), **{f"live {name}": tensor for name, tensor in live.items()}}
    offsets = {name: tensor for name, tensor in model.named_buffers() if name.endswith("offsets")}
    return {name: tensor.detach().clone() for name, tensor in {**tensors, **offsets}.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit; what an update rule keeps comes with the first update."""
    return all(torch.equal(value, other[name]) for name, value in one.items() if name in other)


def life(dice: random.Random, kind: str) -> tuple[list[str], str]:
    """What went wrong with one optimizer, and what it was."""
    dtype = dice.choice([torch.float16, torch.bfloat16, torch.float32])
    model, options = Tiny(dtype, offset=kind == "offsets"), options_of(dice, kind)
    steep, broken = dice.choice([1.0, power(dice, -30, 300)]), dice.choice([0.0, 0.3])
    about = f"{kind} {dtype} steep {steep:g} {options}"
    good: dict[str, Tensor] = {}
    try:
        if "MeZO" in kind:
            optimizer: Any = qzo.MeZO(model.requires_grad_(False).named_parameters(), **options)
        else:
            optimizer = qzo.QZO(qzo.scales(model), **options)
        good = numbers_of(model, optimizer, kind)
        for step in range(STEPS):
            is_broken = dice.random() < broken
            skipped = optimizer.skipped_steps
            optimizer.step(lambda: float("nan") if is_broken else steep * float(model.loss(step)))  # noqa: B023
            now = numbers_of(model, optimizer, kind)
            if not all(bool(tensor.isfinite().all()) for tensor in now.values()):
                return ["infinite"], f"{about} step {step} {optimizer.last}"
            if optimizer.skipped_steps == skipped:
                good = now
            elif kind != "classic MeZO" and not same(now, good):
                return ["changed_by_a_skip"], f"{about} step {step} {optimizer.last}"
    except qzo.QzoError as error:
        wrong = ["more_than_a_line"] if not str(error).isprintable() else []
        claims = "last good step" in str(error) or "untouched" in str(error)
        left = numbers_of(model, optimizer, kind) if claims else {}
        is_true = kind == "classic MeZO" or same(left, good)
        finite = all(bool(tensor.isfinite().all()) for tensor in left.values())
        wrong += [] if is_true else ["false_claims"]
        return wrong + ([] if finite else ["infinite"]), f"{about}: {error}"
    except Exception as error:
        return ["tracebacks"], f"{about}: {type(error).__name__}: {error}"
    return [], about


def runs(folder: Path, many: int, counts: Counter[str]) -> None:
    """Runs of the command: they end in a state that is finite, or in one line."""
    works(folder)  # a model, and a stand-in for the tasks
    dice = random.Random("runs")
    for number in range(many):
        out = folder / f"run-{number}"
        given = ["train", str(folder / "packed"), *standin.PAPER, "--batch-size", "4", "--steps", "12", "--eval-every"]
        given += ["4", "--lr", f"{power(dice, -40, 60):g}", "--out", str(out), "--dtype"]
        given += [dice.choice(["float16", "bfloat16", "float32"])]
        given += dice.choice([[], ["--eps", f"{power(dice, -40, 30):g}"], ["--relative", "--eps", "1e-2"]])
        given += dice.choice([[], ["--clip-threshold", f"{power(dice, -40, 60):g}"], ["--clip-threshold", "inf"]])
        code, text = alive(lambda given=given: command(given))
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        wrong = ["tracebacks"] * ("Traceback" in text or code not in (0, 2))
        wrong += ["more_than_a_line"] * (code == 2 and len(errors) != 1)
        best = out / "best.safetensors"
        tensors = read_tensors(best)[0] if best.exists() else {}
        wrong += ["infinite"] * (not all(bool(tensor.isfinite().all()) for tensor in tensors.values()))
        if code == 0:
            json.loads((out / "result.json").read_text(), parse_constant=wrong.append)
        counts.update([*wrong, "tried", f"exit code {code}"])
        if wrong:
            print(f"{' '.join(given)}: {wrong} {text[-400:]!r}", flush=True)


def main(many: int) -> NoReturn:
    """All kinds in turn."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for number in range(many):
        wrong, about = life(random.Random(number), KINDS[number % len(KINDS)])
        counts.update([*wrong, "tried"])
        if wrong:
            print(f"{number}: {wrong} {about}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        runs(Path(folder), many // 20, counts)
    print(counts, file=sys.stderr)
    figures.finish("extreme settings", counts["tried"], **{what: counts[what] for what in WRONG})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
