"""Two processes that do the same work in the same place: one of them does it, as if it had been alone.

    python tests/attack/attack_pairs.py [WORK ...]

For each file operation of a train, a first-order run, a journal, an export, a quantize, a replay and a QZOTrainer, the
process is stopped there while another one does the same from beginning to end, and then goes on; after these come
MANY pairs that begin at the same moment. Each process then has done the work, or says in one line why not; what is
there is what one alone would have made.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import figures
import torch
import trainer_lives
from crash_works import Work, works
from crashes import Ended, at_once, operations, stopped_at
from standin import write_model
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from qzo import QzoError

MANY = 50
WRONG = ("different", "both_failed", "tracebacks", "half", "left_over")


def main(wanted: list[str]) -> NoReturn:
    """All works, or those named."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        made = {**works(Path(folder)), "trainer": _trainer(Path(folder))}
        for name in wanted or list(made):
            _attack(name, made[name], Path(folder), counts)
    figures.finish("pairs", counts["tried"], **{what: counts[what] for what in WRONG})


def _attack(name: str, work: Work, folder: Path, counts: Counter[str]) -> None:
    (whole := folder / f"{name}-whole").mkdir()
    with contextlib.redirect_stdout(sys.stderr):
        operation = operations(whole, lambda: _said(work, whole))
    wanted = work.result(whole)

    def pair(what: str, do: Callable[[Path], tuple[Ended, Ended]]) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as life:
            place = Path(life)
            for problem, about in _problems(work, place, do(place), wanted).items():
                counts[problem] += 1
                print(f"{name}, {what}: {problem} {about!r}", flush=True)
        counts["tried"] += 1

    for number, what in enumerate(operation):
        pair(
            what,
            lambda place, number=number: stopped_at(
                place, number, lambda: _said(work, place), lambda: _said(work, place)
            ),
        )
    for number in range(MANY):
        pair(f"pair {number}", lambda place: tuple(at_once(lambda: _said(work, place), lambda: _said(work, place))))


def _said(work: Work, place: Path) -> int:
    """The exit code of a work; a program of a user's own shows its error as a command does."""
    try:
        return work.begin(place)
    except QzoError as error:
        print(f"error: {error}")
        return 2


def _problems(work: Work, place: Path, ended: tuple[Ended, Ended], wanted: dict[str, object]) -> dict[str, str]:
    codes, texts = zip(*ended, strict=True)
    about = " | ".join(f"{code}: {text[-300:]}" for code, text in ended)
    if 0 not in codes:
        return {"both_failed": about}
    problems = {"tracebacks": about} if "Traceback" in "".join(texts) or set(codes) - {0, 2} else {}
    if work.result(place) != wanted:
        problems["half" if work.whole else "different"] = about
    hidden = [path.name for path in place.rglob(".*") if path.name.endswith((".part", ".saving", ".gone", ".old"))]
    return problems | ({"left_over": f"{hidden} {about}"} if hidden else {})


def _trainer(folder: Path) -> Work:
    """QZOTrainer with checkpoints and a journal, as in attack_trainer."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config("llama", False), dtype=torch.bfloat16).eval()
    model = write_model(made, folder / "trainer-model", True, "gptq_v2")

    def begin(place: Path) -> int:
        trainer_lives.live(model, place)
        return 0

    class Trained(Work):
        def result(self, place: Path) -> dict[str, object]:
            return dict(trainer_lives.ends(place))

    return Trained(begin, begin)


if __name__ == "__main__":
    main(sys.argv[1:])
