"""Damage to the checkpoints of QZOTrainer, as an attack on resume, on the best model at the end, and on export.

    python tests/attack/attack_checkpoints.py [FLIPS]

Of the newest checkpoint of a run, of QZO with a journal and of MeZO, each file gets FLIPS single flipped bits, is cut,
emptied, removed, or put in from the checkpoint before. A resume of the newest checkpoint, a resume from this one by
name, and an export of it then end in one line of error, or come to the very end of the undamaged run.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import figures
import torch
from crashes import alive
from standin import write_model
from tiny_models import tiny_config
from trainer_lives import OPTIONS, dataset, ends, make
from transformers import AutoModelForCausalLM, TrainingArguments

import qzo

STEPS = {"save_steps": 2, "max_steps": 5}  # checkpoint-2 and checkpoint-4, one step to go
NEWEST = "checkpoint-4"
WRONG = ("silent", "tracebacks", "half", "hangs")


class Run:
    """A run of one kind, to its end once; what is left of another that was stopped at its newest checkpoint."""

    def __init__(self, model: Path, place: Path, is_mezo: bool) -> None:
        self.model, self.is_mezo, self.stopped = model, is_mezo, place / "stopped"
        self.stopped.mkdir(parents=True)
        code, text = alive(lambda: self._train(self.stopped, True))
        assert code == 0, text
        shutil.rmtree(self.stopped / "out/checkpoint-5")
        self.wanted = {what: self.outcome(what, self.stopped) for what in self.ways()}
        assert all(code == 0 for code, _, _ in self.wanted.values()), self.wanted

    def ways(self) -> list[str]:
        """What is tried on a damaged checkpoint."""
        return ["resume", "resume by name", *([] if self.is_mezo else ["export"])]

    def outcome(self, what: str, stopped: Path) -> tuple[int, str, Any]:
        """Exit code, what was printed, and what came of it, of a copy of a run's folder."""
        with tempfile.TemporaryDirectory() as life:
            place = Path(life) / "run"
            shutil.copytree(stopped, place)
            checkpoint = place / "out" / NEWEST
            if what == "export":
                code, text = alive(lambda: self._export(checkpoint, place / "exported"))
                made = place / "exported"
                return code, text, {f.name: f.read_bytes() for f in made.iterdir()} if made.exists() else None
            code, text = alive(lambda: self._train(place, True if what == "resume" else str(checkpoint)))
            return code, text, self._end(place) if code == 0 else None

    def _end(self, place: Path) -> dict[str, bytes]:
        if not self.is_mezo:
            return ends(place)
        last = place / "out/checkpoint-5"
        return {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.pt")}

    def _train(self, place: Path, resume: bool | str) -> int:
        options = {**STEPS, "save_total_limit": 3}
        try:
            trainer = make(self.model, place, **options) if not self.is_mezo else _mezo(self.model, place, options)
            trainer.train(resume_from_checkpoint=resume)
            if not self.is_mezo:
                trainer.save_model(str(place / "tuned"))
                trainer.save_model(str(place / "out"))
        except qzo.QzoError as error:
            print(f"error: {error}")
            return 2
        return 0

    def _export(self, checkpoint: Path, out: Path) -> int:
        try:
            qzo.export(checkpoint, out)
        except qzo.QzoError as error:
            print(f"error: {error}")
            return 2
        return 0


def _mezo(model: Path, place: Path, options: dict[str, Any]) -> qzo.QZOTrainer:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return qzo.QZOTrainer(
        loaded,
        TrainingArguments(str(place / "out"), **{**OPTIONS, **options}),
        train_dataset=dataset("train"),
        eval_dataset=dataset("validation"),
        optimizers=(qzo.MeZO(loaded.named_parameters(), lr=1e-4), None),
    )


def damages(checkpoint: Path, flips: int, dice: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What it is, and the change of a copy of the checkpoint."""
    for file in sorted(file for file in checkpoint.iterdir() if file.is_file()):
        data, name = file.read_bytes(), file.name
        for _ in range(flips):
            place, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
            flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            yield f"{name}, byte {place}", lambda to, name=name, flipped=flipped: (to / name).write_bytes(flipped)
        yield f"{name}, cut", lambda to, name=name, data=data: (to / name).write_bytes(data[: len(data) // 2])
        yield f"{name}, empty", lambda to, name=name: (to / name).write_bytes(b"")
        yield f"{name}, gone", lambda to, name=name: (to / name).unlink()
        older = checkpoint.with_name("checkpoint-2") / name
        yield f"{name}, an older one", lambda to, older=older: shutil.copyfile(older, to / older.name)


def attack(run: Run, flips: int, counts: Counter[str]) -> None:
    """All damages of one run."""
    dice = random.Random(run.is_mezo)
    for where, change in damages(run.stopped / "out" / NEWEST, flips, dice):
        with tempfile.TemporaryDirectory() as life:
            damaged = Path(life) / "run"
            shutil.copytree(run.stopped, damaged)
            change(damaged / "out" / NEWEST)
            for what in run.ways():
                code, text, result = run.outcome(what, damaged)
                wrong = ["silent"] * (code == 0 and result != run.wanted[what][2])
                wrong += ["tracebacks"] * ("Traceback" in text or code not in (0, 2))
                wrong += ["half"] * (what == "export" and code != 0 and result is not None)
                counts.update([*wrong, "accepted" if code == 0 else "refused"])
                if wrong:
                    kind = "MeZO" if run.is_mezo else "QZO"
                    print(f"{kind}, {where}, {what}: {wrong} {code} {text[-400:]!r}", flush=True)
        counts["tried"] += 1


def main(flips: int) -> NoReturn:
    """Both kinds of run."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        for is_mezo in (False, True):
            made = AutoModelForCausalLM.from_config(tiny_config("llama", False), dtype=torch.bfloat16).eval()
            model = write_model(made, Path(place, f"model-{is_mezo}"), not is_mezo, "gptq_v2")
            attack(Run(model, Path(place, f"run-{is_mezo}"), is_mezo), flips, counts)
    print(f"{counts['refused']} refused, {counts['accepted']} came to the same end or were as before", file=sys.stderr)
    figures.finish("checkpoints", counts["tried"], **{what: counts[what] for what in WRONG[:3]})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
