"""A thousand damaged checkpoints of every format, each read by load and inspect, every tenth by a command too.

Half of the changes are random, in headers, settings and archives; the others are made to be refused, and one that is
accepted counts as silent, as does an accepted model with logits that are no numbers. `attack_damaged.py NAME ...`
tries some formats only; the variable INPUTS says how many of each (1,000).
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path

import figures
import hostile
import torch
from gguf_files import tiny, write_gguf
from mutations import Hung, alarmed, mutate, mutated_bytes, mutated_json, put_back
from tiny_models import write_plain

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect
from qzo.commands.main import main
from qzo.formats.gguf.header import read_gguf_header

INPUTS = int(os.environ.get("INPUTS", "1000"))
SECONDS, GIB = 5, 2**20  # of KiB
MODULES = ("aqlm", "awq", "bnb", "compressed", "gptq", "hqq", "torchao")
WRONG = ("silent", "tracebacks", "more_than_a_line", "half_folders", "over_1_GiB", "hangs")


def formats(place: Path) -> dict[str, Path]:
    """Name of a kind -> folder of a sound checkpoint, of all kinds whose libraries are here."""
    found = {"plain": write_plain("llama", place / "plain")}
    for module in MODULES:
        for case in import_module(f"cases_{module}").CASES:
            if case.family == "llama" and (place / case.name) not in found.values():
                case.write(found["plain"], place / case.name)
                found[case.name] = place / case.name
    for kind in ("Q4_0", "Q5_1", "Q8_0", "Q4_K"):
        (place / kind).mkdir()
        write_gguf(tiny(hidden=256), place / kind / "model.gguf", kind)
        found[f"gguf-{kind}"] = place / kind
    return found


def change(folder: Path, dice: random.Random) -> bool:
    """Change a checkpoint; whether it must then be refused."""
    if (folder / "model.gguf").is_file():
        return change_gguf(folder / "model.gguf", dice)
    if (folder / "qmodel.pt").is_file():
        return change_pickle(folder, dice)
    return mutate(folder, dice)


def change_gguf(file: Path, dice: random.Random) -> bool:
    """A value of the metadata that no model has, a scale that is no number, a file cut off; or random bytes."""
    if dice.random() < 0.4:
        harms = {**hostile.GGUF, **hostile.GGUF_NODES}
        dice.choice(list(harms.values()))(file)
        return True
    data, header = bytearray(file.read_bytes()), read_gguf_header(file)
    start = min(info.offset for info in header.tensors.values())
    kind = dice.random()
    if kind < 0.2:
        file.write_bytes(data[: -dice.randrange(1, len(data))])
        return True
    if kind < 0.4:
        info = dice.choice([info for name, info in header.tensors.items() if name.endswith("norm.weight")])
        place = info.offset + dice.randrange(info.n_bytes // 4) * 4
        data[place : place + 4] = dice.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"])
        file.write_bytes(data)
        return True
    for _ in range(dice.randrange(1, 4)):
        width = dice.choice((1, 1, 4, 8))
        place = dice.randrange(4, start - width)
        data[place : place + width] = dice.choice((dice.randbytes(width), b"\xff" * width, bytes(width)))
    file.write_bytes(data)
    return False


def change_pickle(folder: Path, dice: random.Random) -> bool:
    """A qmodel.pt made by hand, a tensor that is not finite or not there; or random bytes and settings."""
    file, kind = folder / "qmodel.pt", dice.random()
    if kind < 0.2:
        dice.choice(list(hostile.PICKLES.values()))(folder)
        return True
    if kind < 0.4:
        state = torch.load(file, weights_only=True)
        path = dice.choice(sorted(path for path, about in state.items() if "W_q" in about))
        if dice.random() < 0.5:
            state[path]["scale"].view(-1)[0] = dice.choice([torch.nan, torch.inf])
        else:
            state.pop("model.norm")
        torch.save(state, file)
        return True
    if kind < 0.6:
        config = folder / "config.json"
        config.write_text(json.dumps(mutated_json(json.loads(config.read_text()), dice)))
    else:
        file.write_bytes(mutated_bytes(file.read_bytes(), dice))
    return False


def says(reader: str, path: Path) -> str | None:
    """What a reader has against a checkpoint, None where it has nothing; for an accepted model, whether it computes."""
    out = path.with_name("out")
    try:
        if reader == "inspect":
            return inspect(path).reason
        if reader == "command":
            return None if main(["quantize", str(path), str(out), "--group-size", "32"]) == 0 else "exit code 2"
        model = load(path, torch.float32, dequantize=reader != "packed")
        with torch.no_grad():
            logits = model(torch.arange(3, 9)[None]).logits
        return None if bool(torch.isfinite(logits).all()) else "silent: its logits are no numbers"
    except QzoError as error:
        return str(error)


def attack(name: str, folder: Path) -> Counter[str]:
    """Change and read one checkpoint again and again."""
    dice, counts = random.Random(name), Counter()
    original = {file: file.read_bytes() for file in folder.iterdir()}
    path = folder / "model.gguf" if name.startswith("gguf") else folder
    readers = ["packed" if name.startswith("gguf") else "load", "inspect"]
    for reader in (*readers, "load"):
        says(reader, path)
    for turn in range(INPUTS):
        try:
            must = change(folder, dice)
        except (ValueError, KeyError, IndexError):  # the change itself has no place in this checkpoint
            put_back(folder, original)
            continue
        for reader in [*readers, *(["command"] if turn % 10 == 0 else [])]:
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
            wrong, told = "", None
            try:
                with alarmed(4 * SECONDS):
                    told = says(reader, path)
            except Hung:
                wrong, told = "hangs", "hang"
            except Exception as error:
                wrong, told = "tracebacks", f"{type(error).__name__}: {error}"
                traceback.print_exc()
            if (told is None and must) or (told is not None and told.startswith("silent")):
                wrong = "silent"
            elif told is not None and not told.isprintable():
                wrong = wrong or "more_than_a_line"
            if time.monotonic() - start > SECONDS:
                wrong = "hangs"
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > GIB:
                wrong = "over_1_GiB"
            if told is not None and path.with_name("out").exists():
                wrong = "half_folders"
            shutil.rmtree(path.with_name("out"), ignore_errors=True)
            counts.update([wrong] if wrong else [])
            if wrong:
                print(f"{name}, turn {turn}, {reader}: {wrong}: {str(told)[:300]!r}", flush=True)
        counts["tried"] += 1
        counts["refused"] += told is not None
        put_back(folder, original)
    print(f"{name}: {counts['tried']} tried, {counts['refused']} refused", flush=True)
    return counts


def run(names: list[str]) -> None:
    """All formats, or those named."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30,) * 2)
    sys.stderr = open(os.devnull, "w") if not names else sys.stderr  # noqa: SIM115 - bars, and what the command prints
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        for name, folder in formats(Path(place)).items():
            if not names or name in names:
                own = Path(place) / "attacked" / name
                shutil.copytree(folder, own)
                total += attack(name, own)
    figures.finish("damaged", total["tried"], **{what: total[what] for what in WRONG})


if __name__ == "__main__":
    run(sys.argv[1:])
