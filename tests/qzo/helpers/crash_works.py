"""What is killed at each of its file operations, how it is taken up again, and what must come of it.

work = works(folder)["train"]        # `folder` gets a model, made once
work.begin(place)                    # the work, in the new folder `place`
work.go_on(place)                    # after a kill: the same again, or with --resume
work.result(place)                   # file -> content, of what was made; None where there is nothing
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import lives
import standin
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

import qzo.training.task  # noqa: F401  # before the stand-in, which would get the parts of the real one
from qzo.commands.main import main

TRAIN = [*standin.PAPER, "--batch-size", "4", "--steps", "4", "--eval-every", "2", "--lr", "1e-3"]


@dataclass(frozen=True)
class Work:
    """See above. `whole`: what is made is there with all its files or not at all, so that nothing is gone on with."""

    begin: Callable[[Path], int]
    go_on: Callable[[Path], int]
    files: tuple[str, ...] = ()
    whole: bool = False

    def result(self, place: Path) -> dict[str, object] | None:
        """File -> content of what the work makes at `place`."""
        if self.whole:
            out = place / "out"
            return {file.name: file.read_bytes() for file in out.iterdir()} if out.exists() else None
        return {
            name: standin.metrics(place / "run") if name == "metrics.jsonl" else (place / "run" / name).read_bytes()
            for name in self.files
        }


def works(folder: Path) -> dict[str, Work]:
    """Name -> work. Puts a stand-in into the place of `qzo.tasks`."""
    sys.modules["qzo.tasks"] = standin.module()
    torch.manual_seed(0)
    config = tiny_config("llama", False)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 32, 32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    plain = standin.write_model(model, folder / "plain", False)
    packed = standin.write_model(model, folder / "packed", True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(["train", str(packed), *TRAIN, "--out", str(folder / "trained")]) == 0
    journal = str(folder / "trained/run.journal")

    def train(method: str, source: Path, *more: str) -> Work:
        command = ["train", str(source), *TRAIN, "--method", method, "--out"]
        kept = ("run.journal",) if method == "qzo" else ("last.safetensors",)
        return Work(
            lambda place: main([*command, str(place / "run")]),
            lambda place: main([*command, str(place / "run"), "--resume"]),
            (*kept, *more, "best.safetensors", "metrics.jsonl", "result.json"),
        )

    def making(*command: str) -> Work:
        def run(place: Path) -> int:
            return main([*command, str(place / "out")])

        return Work(run, run, whole=True)

    return {
        "train": train("qzo", packed),
        "train from a run": train("qzo", folder / "trained", "start.safetensors"),
        "first order": train("ft", plain),
        "journal": Work(_own_loop, _own_loop, ("run.journal", "scales")),
        "export": making("export", str(folder / "trained")),
        "quantize": making("quantize", str(plain), "--group-size", "32"),
        "replay": making("replay", str(packed), journal),
    }


def _own_loop(place: Path) -> int:
    (place / "run").mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = lives.train(place / "run", "momentum", stop=9)
    made = place / f"scales.{os.getpid()}"
    torch.save(tensors, made)
    made.replace(place / "run/scales")
    return 0
