"""Cells in processes: failures become rows, finished cells stay on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.cases.case import BenchCase
from bench.records.files import load_results
from bench.worlds import runner
from bench.worlds.runner import Progress, Worker, run_cells

ROOT = Path(__file__).parents[3]


def case(method: str, **options) -> BenchCase:
    return BenchCase("opt-125m", method, gpu="rtx-4090", seq_len=16, **options)


def test_cells_are_written_as_they_finish_and_a_failed_one_is_a_row_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    seen = []
    broken = BenchCase(str(tmp_path / "nowhere"), "lora")
    run_cells([case("qzo"), broken, case("ft-sgd")], tmp_path, lambda record: seen.append(record["case"]["method"]))
    records = load_results(tmp_path)
    assert sorted(seen) == ["ft-sgd", "lora", "qzo"]
    assert {method: record["status"] for method, record in records.items()} == {
        "ft-sgd": "ok", "lora": "unsupported", "qzo": "ok",
    }  # fmt: skip
    assert "nowhere" in records["lora"]["message"]
    assert not list(tmp_path.glob(".worker*"))


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [("kill -9 $$", "oom", "SIGKILL"), ("echo bad luck >&2; exit 3", "error", "bad luck")],
)
def test_a_killed_process_is_an_oom_row_and_a_crashed_one_an_error(script, status, message, tmp_path, monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda command, **options: popen(["/bin/sh", "-c", script], **options)
    )
    worker = Worker(tmp_path / "log")
    record = worker.ask(case("qzo", device="cpu"))
    worker.close()
    assert record["status"] == status
    assert message in record["message"]
    assert record["world"] == "measured-cpu"


def test_progress_tells_what_is_left(capsys):
    progress = Progress(2)
    record = {"case": {"method": "qzo"}, "world": "simulated", "status": "oom", "message": "too big"}
    progress(record)
    line = capsys.readouterr().err
    assert line.startswith("[1/2] qzo") and "too big" in line and "left" in line


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_finished_cells_and_their_summary_and_no_process_behind(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "run", "llama3.1-405b", "--methods", "ft-sgd,mezo,qzo", "--device", "sim"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )  # fmt: skip
    while not (out / "ft-sgd.json").exists() and process.poll() is None:  # however busy the machine is
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert "ft-sgd" in load_results(out)
    assert json.loads((out / "summary.json").read_text())["records"]
    assert not list(out.glob(".*"))
