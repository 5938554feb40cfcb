"""`torchrun -m qzo train`: the run of one process to the bit, whatever rank is killed, and errors that are told."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Options of `qzo train` but --out, and the files of a run that one process made."""
    folder, tokenizer = tmp_path_factory.mktemp("together"), make_tokenizer()
    save(
        quantize(make_model(len(tokenizer), torch.bfloat16), group_size=32), folder / "model", checkpoint_format="gptq"
    )
    tokenizer.save_pretrained(folder / "model")
    options = [str(folder / "model"), "--data", str(write_kind(folder, "completion")), *SHORT]
    alone = run(["-m", "qzo", "train", *options, "--out", str(folder / "alone")])
    assert alone.returncode == 0, alone.stderr
    return options, contents(folder / "alone")


def run(arguments, **options):
    return subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True, **options)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(size, options, *more):
    return [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *more, "-m", "qzo", "train", *options
    ]  # fmt: skip


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_several_processes_write_the_run_that_one_writes(made, tmp_path):
    options, alone = made
    done = run(torchrun(3, [*options, "--out", str(tmp_path / "run")]), timeout=WITHIN)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "run") == alone
    assert done.stdout.count("best step") == 1  # of rank 0


def workers(process):
    """Processes of ranks, in their order."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            rank = child.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None and child.ppid() == process.pid:
            found.append((int(rank), child))
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def steps_in(journal):
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def test_a_rank_that_is_killed_comes_back_and_the_run_ends_the_same(made, tmp_path):
    options, alone = made
    command = torchrun(2, [*options, "--out", str(tmp_path / "run")], "--max-restarts=2", "--monitor-interval=0.1")
    process = subprocess.Popen([sys.executable, *command], env=environment(), stderr=subprocess.PIPE, text=True)
    end, journal = time.monotonic() + WITHIN, tmp_path / "run" / "run.journal"
    while steps_in(journal) < 2 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    ranks = workers(process)
    random.choice(ranks).send_signal(signal.SIGKILL)
    told = process.communicate(timeout=WITHIN)[1]
    assert process.returncode == 0, told
    assert len(ranks) == 2 and contents(tmp_path / "run") == alone


def test_a_method_with_gradients_is_refused_on_all_ranks(made, tmp_path):
    options, _ = made
    done = run(torchrun(2, [*options, "--method", "qlora", "--out", str(tmp_path / "run")]), timeout=WITHIN)
    assert "error: qlora has gradients to exchange" in done.stderr and done.returncode != 0
    assert not (tmp_path / "run").exists()
