"""Runs of `torchrun -m qzo train` on a tiny model, and its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from own_files import write_kind
from task_files import make_model, make_tokenizer

from qzo import quantize
from qzo.checkpoints.save import save

STEPS = 12
WITHIN = 240  # seconds; a run takes ten
SHORT = [
    "--preset", "paper", "--relative", "--eps", "1e-2", "--steps", str(STEPS), "--eval-every", "4", "--batch-size", "4",
    "--lr", "1e-3", "--directions", "3", "--estimator", "one-sided", "--validation-samples", "4", "--test-samples", "3",
]  # fmt: skip
FILES = ("run.journal", "best.safetensors", "result.json")


def make_run(folder: Path) -> tuple[list[str], dict[str, bytes]]:
    """Options of `qzo train` but --out, and the files of a run that one process made."""
    tokenizer = make_tokenizer()
    model = quantize(make_model(len(tokenizer), torch.bfloat16), group_size=32)
    save(model, folder / "model", checkpoint_format="gptq")
    tokenizer.save_pretrained(folder / "model")
    options = [str(folder / "model"), "--data", str(write_kind(folder, "completion")), *SHORT]
    alone = run(["-m", "qzo", "train", *options, "--out", str(folder / "alone")])
    assert alone.returncode == 0, alone.stderr
    return options, contents(folder / "alone")


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, to its end."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=WITHIN)


def environment() -> dict[str, str]:
    """That of this process, with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(size: int, options: list[str], *more: str) -> list[str]:
    """Arguments of Python for so many processes."""
    ours = ["-m", "qzo", "train", *options]
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *more, *ours]


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves behind."""
    return {name: (folder / name).read_bytes() for name in FILES}


def killed(size: int, options: list[str], rank: int, is_time: Callable[[], bool]) -> tuple[int, bool, str]:
    """A run of which a rank is killed when it is time: exit code, whether there was one to kill, what was told."""
    command = [sys.executable, *torchrun(size, options, "--max-restarts=2", "--monitor-interval=0.1")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not is_time() and process.poll() is None:
        time.sleep(0.01)
    ranks = _ranks(process) if process.poll() is None else []
    if len(ranks) == size:
        ranks[rank].send_signal(signal.SIGKILL)
    told = process.communicate(timeout=WITHIN)[0]
    return process.returncode, len(ranks) == size, told


def _ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of ranks, in their order."""
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            found.append((int(child.environ()["RANK"]), child))
        except (psutil.Error, KeyError):
            continue
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]
