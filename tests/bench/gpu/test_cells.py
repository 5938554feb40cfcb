"""Cells measured several at a time, as far as the memory goes, beside their predictions."""

import json
import threading
import time

from bench.cases.case import BenchCase
from bench.gpu import cells
from bench.validation.compare import predict_all
from bench.validation.measurement import read_rows

PREDICTED = {
    "status": "ok", "message": None, "parameters": {"total": 1 << 30, "trainable": 1},
    "figures": {"allocated": 1, "reserved": 2, "process": 3 << 30},
}  # fmt: skip


def test_the_dry_run_writes_records_beside_their_predictions(llama_folder, tmp_path):
    arguments = ["--device", "cpu", "--models", str(llama_folder), "--methods", "qzo,mezo", "--seq-len", "64"]
    assert cells.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [row["case"]["method"] for row in rows] == ["qzo", "mezo"]
    assert all(row["world"] == "measured-cpu" and row["predicted"]["allocated"] > 0 for row in rows)
    assert [row["status"] for row in predict_all(read_rows(tmp_path / "cpu.jsonl"))] == ["ok", "ok"]
    assert len(json.loads((tmp_path / "cpu.predictions.json").read_text())) == 2
    assert not (tmp_path / "cpu.failures.txt").exists()


def test_a_second_session_measures_what_the_file_lacks(llama_folder, tmp_path, capsys):
    arguments = ["--device", "cpu", "--models", str(llama_folder), "--seq-len", "64", "--out", str(tmp_path)]
    assert cells.main([*arguments, "--methods", "mezo"]) == 0
    first = (tmp_path / "cpu.jsonl").read_text()
    assert cells.main([*arguments, "--methods", "mezo,qzo", "--missing"]) == 0
    both = (tmp_path / "cpu.jsonl").read_text()
    assert both.startswith(first)
    assert [json.loads(line)["key"].split(", ")[-2] for line in both.splitlines()] == ["mezo", "qzo"]


def test_what_was_predicted_before_is_taken_from_its_file(llama_folder, tmp_path):
    case = BenchCase(str(llama_folder), "qzo", gpu="cpu", seq_len=64, steps=3)
    (tmp_path / "cpu.predictions.json").write_text(json.dumps({cells.key(case): {"status": "oom", "message": "no"}}))
    assert cells.predictions([case], tmp_path / "cpu.predictions.json")[cells.key(case)]["message"] == "no"


def test_what_does_not_fit_or_comes_too_late_is_not_measured(llama_folder, tmp_path, capsys):
    arguments = ["--device", "cpu", "--models", str(llama_folder), "--methods", "qzo", "--seq-len", "64"]
    assert cells.main([*arguments, "--seconds", "0", "--out", str(tmp_path)]) == 1
    assert "the time is over" in capsys.readouterr().err
    assert cells.why_not(PREDICTED, 2 << 30) == "it needs 3.0 of 2.0 GiB"
    assert cells.why_not(PREDICTED, 4 << 30) is None
    assert cells.needed(PREDICTED, BenchCase("opt-125m", "qzo")) == (2 << 30) + cells.LOADING_BYTES
    assert cells.needed(PREDICTED, BenchCase("opt-125m", "ft-amp")) == (4 << 30) + cells.LOADING_BYTES


def test_cells_run_side_by_side_only_where_the_memory_is_enough(monkeypatch):
    together, most, lock = [0], [0], threading.Lock()

    class Worker:
        def __init__(self, log):
            pass

        def ask(self, case):
            with lock:
                together[0] += case.batch_size
                most[0] = max(most[0], together[0])
            time.sleep(0.02)
            with lock:
                together[0] -= case.batch_size
            return {"status": "ok", "message": None}

        def close(self):
            pass

    class Results:
        cases: list = []  # noqa: RUF012

        def add(self, case, record):
            self.cases.append(case.batch_size)

    monkeypatch.setattr(cells, "Worker", Worker)
    queue = cells.Queue(10, time.monotonic() + 60)
    for size in (6, 6, 3, 3, 1, 99):
        queue.add(BenchCase("opt-125m", "qzo", batch_size=size), size)
    queue.waiting[-1] = (BenchCase("opt-125m", "qzo", batch_size=10), queue.waiting[-1][1])
    results = Results()
    queue.work(4, results)
    assert sorted(results.cases) == [1, 3, 3, 6, 6, 10]
    assert most[0] <= 10 and queue.free == 10


def test_the_grid_is_valid_and_has_no_cell_twice():
    cases = list(cells.grid(cells.parser().parse_args([]), "h100-80gb"))
    assert len({cells.key(case) for case in cases}) == len(cases) > 60


def test_without_a_gpu_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cells.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
