"""Memory of cells from 0.1B to 13B with random weights, measured several at a time, beside what was predicted of them.

`python -m bench.gpu.cells` writes one file of records for `bench validate`, each with a key `predicted`: the figures of
the same case, simulated before the measurement. Predictions need no GPU. `--predict GPU` makes them alone, so that none
of the time on a GPU goes to them, and so that they can be committed before anything was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.methods import EXTRA_METHODS, METHODS
from bench.records.files import write_json
from bench.records.record import Record
from bench.validation.recorded import figures
from bench.worlds import cell
from bench.worlds.runner import Worker
from bench.worlds.workers import workers
from qzo.durable import replace_file
from qzo.errors import QzoError
from qzo.optim.estimator import NOISE

SECONDS = 200  # no cell is started after these
STEPS = 3
PATIENCE = 10  # seconds that the largest cell lets others go first
SPARE_BYTES = 2 << 30  # of the GPU's memory that is given to no cell
LOADING_BYTES = 2 << 30  # above a model's unquantized weights, which are on the GPU before they are quantized
QUANTIZATIONS = ("gptq-2", "gptq-3", "gptq-8", "awq", "gguf-q4_0", "gguf-q8_0", "nf4", "aqlm-2x8", "torchao-int4")
ADAPTED = ("lora", "qlora")
WIDE = {"seq_len": 512, "batch_size": 4}

# (models, methods, further options of a case)
GRID: tuple[tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]], ...] = (
    (("opt-125m", "llama3.2-1b", "llama2-7b", "llama2-13b"), METHODS, {"seq_len": 512}),
    (("llama2-7b",), EXTRA_METHODS, {"seq_len": 512}),
    (("llama2-7b",), ("lora", "qlora", "mezo", "qzo"), {"seq_len": 128, "batch_size": 16}),
    (("llama2-7b", "llama2-13b"), ADAPTED, {**WIDE, "gradient_checkpointing": True}),
    (("llama3.1-8b", "opt-6.7b"), ("lora", "mezo", "qzo", "qzo-full"), WIDE),
    *((("llama3.2-1b",), ("qzo",), {"seq_len": 512, "quantization": name}) for name in QUANTIZATIONS),
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog="python -m bench.gpu.cells", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for a dry run")
    found.add_argument("--models", help="comma-separated, in place of the cells of GRID")
    found.add_argument("--methods", help="comma-separated, for --models; default all ten")
    found.add_argument(
        "--noise",
        default="generator",
        choices=tuple(NOISE),
        help="where z comes from, for --models (default: %(default)s)",
    )
    found.add_argument("--seq-len", type=int, default=512, help="tokens, for --models (default: %(default)s)")
    found.add_argument("--processes", type=int, default=10, help="cells at a time (default: %(default)s)")
    found.add_argument(
        "--seconds", type=float, default=SECONDS, help="start no cell after these (default: %(default)s)"
    )
    found.add_argument("--missing", action="store_true", help="keep what the file holds, and measure only the others")
    found.add_argument("--predict", metavar="GPU", help="write the predictions for this GPU, and measure nothing")
    found.add_argument("--out", type=Path, default=Path("reports/measurements"), help="folder (default: %(default)s)")
    return found


def run(options: argparse.Namespace) -> int:
    """Measure what fits and write what came of it; exit code 0, or 1 if a cell failed or none was measured."""
    start = time.monotonic()
    target, memory = (options.predict, 0) if options.predict else device_at_hand(options.device)
    cases = list(grid(options, target))
    options.out.mkdir(parents=True, exist_ok=True)
    predicted = predictions(cases, options.out / f"{target}.predictions.json")
    if options.predict:
        print(f"{len(cases)} cells predicted for {target}")
        return 0
    on_gpu = options.device == "cuda"
    queue = Queue(memory - SPARE_BYTES if on_gpu else memory, start + options.seconds)
    results = Results(options.out / f"{target}.jsonl", predicted, options.missing)
    for case in cases:
        if key(case) in results.kept:
            continue
        known = predicted[key(case)]
        reason = why_not(known, queue.free)
        if reason:
            say(case, f"not measured, {reason}")
        else:
            queue.add(replace(case, device=options.device, gpu=None), needed(known, case))
    queue.work(options.processes if on_gpu else 1, results)
    print(f"{len(results.lines)} cells in {results.out}; next: python -m bench validate {results.out}")
    return int(results.failed or not results.lines)


def grid(options: argparse.Namespace, target: str) -> Iterator[BenchCase]:
    """The cells to measure, as simulations of `target`."""
    rows = GRID
    if options.models:
        methods = tuple((options.methods or ",".join(METHODS)).split(","))
        rows = ((tuple(options.models.split(",")), methods, {"seq_len": options.seq_len, "noise": options.noise}),)
    for models, methods, further in rows:
        for model in models:
            for method in methods:
                yield BenchCase(model, method, device="sim", gpu=target, steps=STEPS, **further)


def device_at_hand(device: str) -> tuple[str, int]:
    """Name of what `sim` stands for, and its memory in bytes. Raises QzoError without a GPU, or for an unknown one."""
    if device == "cpu":
        return gpus.CPU, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        raise QzoError("no NVIDIA GPU that this PyTorch can use; --device cpu makes a dry run")
    return gpus.find(torch.cuda.get_device_name()).name, int(torch.cuda.get_device_properties().total_memory)


def key(case: BenchCase) -> str:
    """What tells a cell of one device from another."""
    parts = [case.model, case.method, f"{case.batch_size} x {case.seq_len}", case.quantization]
    parts += [
        "checkpointing" if case.gradient_checkpointing else None,
        case.noise if case.noise != "generator" else None,
    ]
    return ", ".join(filter(None, parts))


def predictions(cases: Sequence[BenchCase], file: Path) -> dict[str, Any]:
    """Key -> what is predicted of each case: `status`, `message`, `parameters`, and `figures` of its record.

    Those in `file` are taken from it; the others are simulated, and added to it.
    """
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8-sig")) if file.exists() else {}
    lacking = [case for case in cases if key(case) not in found]
    if not lacking:
        return found
    with workers(len(lacking)) as in_order:
        records = list(in_order(cell.run, lacking))
    for case, record in zip(lacking, records, strict=True):
        parts = {part: record[part] for part in ("status", "message", "parameters")}
        found[key(case)] = parts | {"figures": figures(record)}
    write_json(file, found)
    return found


def needed(predicted: dict[str, Any], case: BenchCase) -> int:
    """Bytes to keep free for a cell: its process, or its unquantized weights while they are loaded."""
    itemsize = 4 if case.method == "ft-amp" else 2
    known = predicted["figures"]
    return max(known.get("process", 0), known["allocated"], predicted["parameters"]["total"] * itemsize + LOADING_BYTES)


def why_not(predicted: dict[str, Any], memory: int) -> str | None:
    """Why a cell is not measured; None if it is."""
    if predicted["status"] != "ok":
        return str(predicted["message"])
    bytes_needed = predicted["figures"].get("process") or predicted["figures"]["allocated"]
    if bytes_needed > memory:
        return f"it needs {bytes_needed / 2**30:.1f} of {memory / 2**30:.1f} GiB"
    return None


def say(case: BenchCase, words: str) -> None:
    """One line on stderr about a cell."""
    print(f"{key(case)}: {words}", file=sys.stderr, flush=True)


class Results:
    """The file of records, written anew as a whole with each: an interrupted run leaves the cells that were finished.

    A record that is not `ok` goes to a file beside it, which is no measurement file. `keep` leaves the records that the
    file holds already; `kept` has their keys.
    """

    def __init__(self, out: Path, predicted: dict[str, Any], keep: bool = False) -> None:
        self.out, self.predicted = out, predicted
        self.lines = out.read_text(encoding="utf-8-sig").splitlines() if keep and out.exists() else []
        self.kept = {json.loads(line)["key"] for line in self.lines}
        self.others: list[str] = []
        self.failed = False

    def add(self, case: BenchCase, record: Record) -> None:
        """Keep the record of a cell."""
        say(case, f"{record['status']} {record['message'] or ''}")
        ok = record["status"] == "ok"
        self.failed |= not ok and record["status"] != "unsupported"
        lines, out = (self.lines, self.out) if ok else (self.others, self.out.with_suffix(".failures.txt"))
        lines.append(json.dumps({**record, "key": key(case), "predicted": self.predicted[key(case)]["figures"]}))
        replace_file(out, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))


class Queue:
    """Cells that run side by side, each in a process of its own, as far as the GPU's memory goes.

    Args:
        free: bytes that cells may take together.
        end: time.monotonic() after which none is started.
    """

    def __init__(self, free: int, end: float) -> None:
        self.free, self.end = free, end
        self.waiting: list[tuple[BenchCase, int]] = []
        self.changed = threading.Condition()
        self.running: set[Worker] = set()
        self.first: tuple[BenchCase, int] | None = None
        self.since = 0.0

    def add(self, case: BenchCase, nbytes: int) -> None:
        """A cell that needs `nbytes` of the GPU, or all of it."""
        self.waiting.append((case, min(nbytes, self.free)))

    def work(self, processes: int, results: Results) -> None:
        """Run all that is waiting, the largest first, for the small ones find room beside them."""
        self.waiting.sort(key=lambda item: -item[1])
        with tempfile.TemporaryDirectory(prefix="qzo-cells-") as folder:
            threads = [
                threading.Thread(target=self._serve, args=(Path(folder) / f"{number}.log", results), daemon=True)
                for number in range(processes)
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:  # interrupted, for the time of the whole part is over
                for worker in list(self.running):
                    worker.close()
        for case, _ in self.waiting:
            say(case, "not measured, the time is over")

    def _serve(self, log: Path, results: Results) -> None:
        while (taken := self._take()) is not None:
            case, nbytes = taken
            worker = Worker(log)
            self.running.add(worker)
            record = worker.ask(case)
            worker.close()
            self.running.discard(worker)
            with self.changed:
                results.add(case, record)
                self.free += nbytes
                self.changed.notify_all()

    def _take(self) -> tuple[BenchCase, int] | None:
        """The next cell once there is room for it; None when nothing is left, or the time is over.

        Smaller ones go before the largest that waits, but not for longer than `PATIENCE`: it would wait for ever.
        """
        with self.changed:
            while self.waiting and time.monotonic() < self.end:
                if self.first is not self.waiting[0]:
                    self.first, self.since = self.waiting[0], time.monotonic()
                others = self.waiting if time.monotonic() < self.since + PATIENCE else self.waiting[:1]
                for index, (_, nbytes) in enumerate(others):
                    if nbytes <= self.free:
                        self.free -= nbytes
                        return self.waiting.pop(index)
                self.changed.wait(timeout=1)
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if every cell was measured, 1 if one failed, 2 and one line on stderr for bad input."""
    try:
        return run(parser().parse_args(arguments))
    except QzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
