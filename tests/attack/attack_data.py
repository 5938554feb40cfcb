"""Data that cannot be trained on, given to `qzo train` as a user gives it, each in a process of its own.

Refused in one line that names the file, and the row where one is at fault, with exit code 2, before the model is
read, under 5 s and without a folder of a run: all else is counted. `python attack_data.py WORD` tries those whose name
has the word in it, and shows each.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import figures

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from damaged_places import faults
from own_files import CHATML
from task_files import make_model, make_tokenizer

import qzo.training.task
from qzo import quantize
from qzo.checkpoints.save import save
from qzo.commands.main import main

SECONDS, MEBIBYTES = 5, 500
READ = "the model was read"

TEMPLATES = {
    "chat": CHATML,
    "plain": None,
    "raises": "{{ raise_exception('roles must alternate') }}",
    "syntax": "{% for m in messages %}",
    "undefined": "{{ messages[0].content.nothing.at_all }}",
    "rewrites": "{{ messages | length }}" + CHATML,
    "silent": "",
}


def models(folder: Path) -> dict[str, Path]:
    """A quantized model for each template."""
    made: dict[str, Path] = {}
    for name, template in TEMPLATES.items():
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        save(
            quantize(make_model(len(tokenizer), torch.bfloat16), group_size=32), folder / name, checkpoint_format="gptq"
        )
        tokenizer.save_pretrained(folder / name)
        made[name] = folder / name
    return made


def train(model: Path, folder: Path, options: list[str], answer: multiprocessing.Queue) -> None:
    """In a child: exit code, what was said, seconds, and how much larger the process became."""
    os.chdir(folder)
    qzo.training.tuned.start.model_with = lambda *_: print(READ, file=sys.stderr) or 1 / 0  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, said = time.monotonic(), StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            code: Any = main(["train", str(model), *options, "--out", "run"])
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    answer.put((code, said.getvalue(), time.monotonic() - start, grown))


def tried(model: Path, folder: Path, options: list[str]) -> tuple[Any, str, float, float]:
    """`train` in a child, which is ended after four times the time it may take."""
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    child = fork.Process(target=train, args=(model, folder, options, answer))
    child.start()
    try:
        found: tuple[Any, str, float, float] = answer.get(timeout=4 * SECONDS)
    except Exception:
        found = (None, "", 4.0 * SECONDS, 0.0)
    finally:
        child.kill()
        child.join()
    return found


def wrong(code: Any, said: str, seconds: float, grown: float, message: str, folder: Path) -> list[str]:
    """What was not as it should be."""
    told = said.splitlines()
    found = {
        "accepted": code == 0,
        "tracebacks": code not in (0, 2, None) or "Traceback" in said,
        "hangs": seconds > SECONDS,
        "over_500_MB": grown > MEBIBYTES,
        "models_read": READ in said,
        "more_than_a_line": len(told) != 1,
        "other_words": not (told and told[-1].startswith("error: ") and message in told[-1]),
        "half_folders": (folder / "run").exists(),
    }
    return [name for name, is_so in found.items() if is_so]


def attack(words: list[str]) -> None:
    """Try all faults, or those with a word in their name."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        made = models(Path(place))
        for number, (name, (model, prepare, options, message)) in enumerate(faults().items()):
            if words and not any(word in name for word in words):
                continue
            folder = Path(place) / f"{number}"
            folder.mkdir()
            prepare(folder)
            code, said, seconds, grown = tried(made[model], folder, options)
            found = wrong(code, said, seconds, grown, message, folder)
            counts.update([*found, "tried"])
            if words or found:
                print(f"{name}: {found} {code} {seconds:.1f} s {grown:.0f} MB {said[-600:]!r}", flush=True)
    kinds = ("accepted", "tracebacks", "hangs", "over_500_MB", "models_read", "more_than_a_line", "other_words",
             "half_folders")  # fmt: skip
    figures.finish("data", counts["tried"], **{what: counts[what] for what in kinds})


if __name__ == "__main__":
    attack(sys.argv[1:])
