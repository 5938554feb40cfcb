"""A run of 200 steps that is killed with SIGKILL again and again: `python lives.py FOLDER KILLS RULE`.

The parent imports once and forks a child for each life; it kills all but the last at a random moment between two
random steps, and prints how far each came. The last child writes the scales to FOLDER/killed.pt.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from tiny import Tiny

import qzo

STEPS = 200
MOST = 9  # steps of a life that is to be killed, after which it waits for that: 20 lives never reach the end
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "philox": {"noise": "philox", "directions": 2},
    "adam": {"betas": (0.9, 0.99), "lr": 1e-4, "directions": 2, "relative": True},
}


def make(rule: str) -> tuple[Tiny, qzo.QZO]:
    """The same model and optimizer in every life."""
    model = Tiny(torch.float16)
    return model, qzo.QZO(qzo.scales(model), **{"lr": 1e-5, "seed": 3, **OPTIONS[rule]})


def train(folder: Path, rule: str, stop: int = STEPS, most: int = STEPS) -> dict[str, torch.Tensor]:
    """From wherever the journal ends to step `stop`, `most` steps at most; returns masters and live scales."""
    model, optimizer = make(rule)
    with qzo.Journal(folder / "run.journal", model, optimizer, snapshot_every=7, sync_every=5) as journal:
        last = journal.resume() + most
        optimizer.register_step_post_hook(journal.record)
        while optimizer.steps < stop:
            step = optimizer.steps
            if step == last:
                signal.pause()
            optimizer.step(lambda: float("nan") if step % 50 == 17 else model.loss(step))  # noqa: B023
    return {**optimizer.truth(), **{name: scale.clone() for name, scale in qzo.scales(model).items()}}


def live(folder: Path, rule: str, most: int) -> None:
    torch.save(train(folder, rule, most=most), folder / "killed.pt.part")
    os.replace(folder / "killed.pt.part", folder / "killed.pt")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(folder: Path, kills: int, rule: str) -> None:
    dice = random.Random(rule)
    journal = folder / "run.journal"
    make(rule)  # what PyTorch imports late is imported here, once
    for life in range(kills + 1):
        start = lines(journal)
        child = os.fork()
        if child == 0:
            warnings.simplefilter("ignore")
            live(folder, rule, MOST if life < kills else STEPS + 1)
            os._exit(0)
        if life < kills:
            wanted = start + dice.randrange(MOST)  # 0 kills it while it loads or replays
            while lines(journal) < wanted:
                time.sleep(0.0002)
            time.sleep(dice.random() * 0.004)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        print(life, how, lines(journal), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
