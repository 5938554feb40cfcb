"""Checkpoints made by hand to hang a reader or to fill its memory, each read in a process of its own.

Refused in one line, under 5 s and 500 MB more than the imports take: all else is counted. `python attack_hostile.py
WORD` tries those whose name has the word in it, and shows each.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import figures

os.environ.setdefault("OMP_NUM_THREADS", "1")
import hostile
import torch
from gguf_files import tiny, write_gguf
from tiny_models import write_plain

from qzo import QzoError, load, quantize
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.load import load_tokenizer
from qzo.checkpoints.save import save
from qzo.commands.main import main

SECONDS, MEBIBYTES = 5, 500


def originals(folder: Path) -> dict[str, Path]:
    """Kind -> a sound checkpoint."""
    from cases_hqq import write as write_hqq

    plain = write_plain("llama", folder / "plain")
    save(quantize(load(plain), 4, 32), folder / "gptq")
    write_hqq(plain, folder / "pt", nbits=4, group_size=32)
    (folder / "gguf").mkdir()
    return {
        "plain": plain,
        "gptq": folder / "gptq",
        "pt": folder / "pt",
        "gguf": write_gguf(tiny(), folder / "gguf" / "model.gguf", "Q4_0"),
    }


READERS = {
    "load": load,
    "packed": lambda path: load(path, dequantize=False),
    "inspect": lambda path: refuse(inspect(path).reason),
    "tokenizer": load_tokenizer,
    "command": lambda path: refuse(main(["quantize", str(path), f"{path}-out", "--group-size", "32"])),
}


def refuse(reason: object) -> None:
    """What an inspection and a command say of a refusal, as the error that loading raises."""
    if reason:
        raise QzoError(reason)


def read(reader: str, path: Path, answer: multiprocessing.Queue) -> None:
    """In a child: what reading gives, its seconds, and how much larger the process became."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30,) * 2)
    start = time.monotonic()
    try:
        READERS[reader](path)
        told = "accepted"
    except QzoError as error:
        told = f"refused: {error}"
    except BaseException as error:
        told = f"traceback: {type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    answer.put((told, time.monotonic() - start, grown))


def tried(reader: str, path: Path) -> tuple[str, float, float]:
    """`read` in a child, which is ended after twice the time it may take."""
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    child = fork.Process(target=read, args=(reader, path, answer))
    child.start()
    try:
        return answer.get(timeout=4 * SECONDS)
    except Exception:
        return "hang", 4.0 * SECONDS, 0.0
    finally:
        child.kill()
        child.join()


def cases() -> list[tuple[str, str, object]]:
    """Kind, name and change of every case."""
    tables = [("gptq", hostile.FOLDERS), ("plain", hostile.FOLDERS), ("plain", hostile.LARGE), ("gptq", hostile.LARGE)]
    tables += [("gguf", hostile.GGUF), ("gguf", hostile.GGUF_NODES), ("gguf", hostile.GGUF_LARGE)]
    tables += [("pt", hostile.PICKLES), ("pt", hostile.PICKLES_LARGE)]
    return [(kind, name, change) for kind, table in tables for name, change in table.items()]


def attack(words: list[str]) -> None:
    """Try all cases, or those with a word in their name."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        sound = originals(Path(place))
        for path in sound.values():
            for reader in ("load", "inspect"):
                READERS[reader](path) if (reader, path) != ("inspect", sound["plain"]) else None
        for kind, name, change in cases():
            if words and not any(word in f"{kind} {name}" for word in words):
                continue
            copy = Path(place) / "copy"
            source = sound[kind].parent if kind == "gguf" else sound[kind]
            shutil.copytree(source, copy)
            path = copy / sound[kind].name if kind == "gguf" else copy
            change(path)
            tokenizer = ("tokenizer" in name and "tokenizer") or "load"
            for reader in {tokenizer, "inspect", "command", "packed" if kind == "gguf" else "load"}:
                if tokenizer == "tokenizer" and reader != "tokenizer" and "folder" in name:
                    continue  # a model without a tokenizer is a model
                told, seconds, grown = tried(reader, path)
                faults = ["tracebacks"] * told.startswith("traceback") + ["hangs"] * (
                    told == "hang" or seconds > SECONDS
                )
                faults += ["over_500_MB"] * (grown > MEBIBYTES) + ["accepted"] * (told == "accepted")
                faults += ["more_than_a_line"] * ("\n" in told)
                faults += ["half_folders"] * Path(f"{path}-out").exists()
                counts.update([*faults, "tried"])
                if words or faults:
                    print(
                        f"{kind} {name}, {reader}: {faults} {seconds:.1f} s {grown:.0f} MB {told[:300]!r}", flush=True
                    )
            shutil.rmtree(copy)
            shutil.rmtree(f"{copy}-out", ignore_errors=True)
    wrong = ("accepted", "tracebacks", "more_than_a_line", "hangs", "over_500_MB", "half_folders")
    figures.finish("hostile", counts["tried"], **{what: counts[what] for what in wrong})


if __name__ == "__main__":
    attack(sys.argv[1:])
