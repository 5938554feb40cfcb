"""Run the cells of one command: each measured one in a fresh process, simulated ones in shared workers."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cases.case import BenchCase
from bench.records.files import write_record
from bench.records.record import Record, failed_record
from bench.worlds.cell import WORLD_OF
from bench.worlds.watch import case_of
from bench.worlds.workers import count

MESSAGE_LENGTH = 300


class Worker:
    """A `bench.worlds.cell` process that answers cases, one after the other."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")}
        environment = {name: value for name, value in environment.items() if value}
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.worlds.cell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True, encoding="utf-8", env=environment, start_new_session=True,
            )  # fmt: skip

    def ask(self, case: BenchCase) -> Record:
        """The record of a case; if the process dies over it, a record that says so."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(asdict(case)) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            record: Record = json.loads(answer)
            return record
        code = self.process.wait()
        killed = code == -9  # the kernel's answer to a process that takes too much memory
        reason = "the process was killed (SIGKILL), most likely out of memory" if killed else self._last_words(code)
        empty = dict.fromkeys(("torch", "transformers", "python", "platform", "gpu", "driver", "commit", "dirty"))
        status = "oom" if killed else "error"
        return failed_record(case_of(case), WORLD_OF[case.device], empty, status=status, message=reason)

    def _last_words(self, code: int) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the process ended with code {code}: {lines[-1] if lines else 'no message'}"[:MESSAGE_LENGTH]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with suppress(BrokenPipeError):  # what a dead process did not read any more
                    pipe.close()


def run_cells(cases: Iterable[BenchCase], out: Path, done: Callable[[Record], None]) -> None:
    """Run the cases, write each record to `out` as soon as it is there, and call `done` with it.

    Interrupted (Ctrl-C), the workers are ended and the finished records stay on disk.
    """
    simulated = [case for case in cases if case.device == "sim"]
    measured = [case for case in cases if case.device != "sim"]
    for batch, workers, fresh in ((simulated, count(len(simulated)), False), (measured, 1, True)):
        if batch:
            _run_batch(batch, workers, fresh, out, done)


def _run_batch(cases: list[BenchCase], workers: int, fresh: bool, out: Path, done: Callable[[Record], None]) -> None:
    waiting: queue.SimpleQueue[BenchCase] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Record | BaseException] = queue.SimpleQueue()
    running: list[Worker] = []
    stopped = threading.Event()
    for case in cases:
        waiting.put(case)

    def serve(number: int) -> None:
        worker: Worker | None = None
        try:
            while not stopped.is_set():
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                if worker is None or fresh or not worker.alive:
                    worker = Worker(out / f".worker-{number}.log")
                    running.append(worker)
                    if stopped.is_set():  # between the check above and the start: nobody else would end it
                        worker.close()
                        return
                answers.put(worker.ask(case))
                if fresh:
                    worker.close()
        except BaseException as error:
            answers.put(error)

    threads = [threading.Thread(target=serve, args=(number,), daemon=True) for number in range(workers)]
    try:
        for thread in threads:
            thread.start()
        for _ in cases:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            write_record(out, answer)
            done(answer)
    finally:
        stopped.set()
        for worker in running:
            worker.close()
        for log in out.glob(".worker-*.log"):
            log.unlink()


class Progress:
    """One line on stderr: what was finished, how many cells are left, and the time that may take."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.finished = 0
        self.start = time.monotonic()

    def __call__(self, record: Record) -> None:
        self.finished += 1
        elapsed = time.monotonic() - self.start
        left = elapsed / self.finished * (self.total - self.finished)
        case: dict[str, Any] = record["case"]
        reason = "" if record["status"] == "ok" else f": {record['message']}"
        print(
            f"[{self.finished}/{self.total}] {case['method']:<8} {record['world']} {record['status']}{reason}"
            f" ({elapsed:.0f} s, about {left:.0f} s left)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
