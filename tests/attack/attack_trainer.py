"""QZOTrainer killed at every file operation of a training, then resumed: the same bits, nothing left over."""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import figures
import torch
from crashes import alive, kill_at, operations
from standin import write_model
from tiny_models import tiny_config
from trainer_lives import ends, left_over, live
from transformers import AutoModelForCausalLM

MANY = 40  # runs that are killed again and again, at random operations


def attack(model: Path, place: Path) -> tuple[int, list[str], list[str], list[str]]:
    """Kills that were tried, and the runs that could not be resumed, ended otherwise, or left something behind."""
    whole = place / "whole"
    whole.mkdir()
    count = len(operations(whole, lambda: live(model, whole)))
    wanted, dice = ends(whole), random.Random(0)
    plans = [[number] for number in range(count)]
    plans += [[dice.randrange(count) for _ in range(4)] for _ in range(MANY)]
    lost, different, left, tried = [], [], [], 0
    for plan in plans:
        folder = place / "run"
        folder.mkdir()
        for number in plan:
            tried += kill_at(folder, number, lambda: live(model, folder))  # noqa: B023
        code, text = alive(lambda: live(model, folder))  # noqa: B023
        if code:
            lost.append(f"{plan}: {text.strip().splitlines()[-1]}")
        elif ends(folder) != wanted:
            different.append(str(plan))
        elif [name for name in left_over(folder) if not name.startswith(".tuned")]:
            left.append(f"{plan}: {left_over(folder)}")
        shutil.rmtree(folder)
    return tried, lost, different, left


def main() -> None:
    """Print what went wrong, and the figures."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        made = AutoModelForCausalLM.from_config(tiny_config("llama", False), dtype=torch.bfloat16).eval()
        model = write_model(made, Path(place, "model"), True, "gptq_v2")
        with contextlib.redirect_stdout(sys.stderr):
            tried, lost, different, left = attack(model, Path(place))
    for what, cases in (("lost", lost), ("different", different), ("left over", left)):
        for case in cases:
            print(f"{what}: {case}")
    figures.finish("trainer", tried, lost=len(lost), different=len(different), left_over=len(left))


if __name__ == "__main__":
    main()
