"""`qzo train` where a disk or a device has no room left."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from full_disk import FullDisk
from standin import SMALL, metrics
from told import errors

from qzo.commands.main import main
from qzo.durable import read_tensors


@pytest.mark.parametrize("room", [60, 400, 470, 900])
def test_a_full_disk_is_one_line_and_nothing_is_lost(task, models, tmp_path, capsys, monkeypatch, room):
    command = ["train", models["quantized"], *SMALL, "--lr", "1e-4", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(os, "write", FullDisk(room))
    assert main([*command, str(tmp_path / "cut")]) == 2
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "qzo.tasks", task)
    lines = errors(capsys)
    assert len(lines) == 1 and "No space left on device" in lines[0]
    cut = tmp_path / "cut"
    assert cut.exists() == (room > 60)  # of a run whose first validation found no room nothing is left
    if cut.exists():
        assert all(line.endswith(b"\n") for line in (cut / "metrics.jsonl").read_bytes().splitlines(True))
    assert main([*command, str(cut), *(["--resume"] if cut.exists() else [])]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    for name in ("run.journal", "best.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_best_state_that_finds_no_room_leaves_the_old_one(task, models, tmp_path, capsys, monkeypatch):
    command = ["train", models["quantized"], *SMALL, "--lr", "1e-4", "--out", str(tmp_path / "run")]
    results = iter([0.5, 0.6, 0.7])
    task.evaluate = lambda *_, **__: {"accuracy": next(results), "loss": 1.0, "count": 1}
    real, calls = __import__("safetensors.torch", fromlist=["save_file"]).save_file, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert main(command) == 2
    assert errors(capsys) == [
        f"error: {tmp_path}/run/best.safetensors could not be written: No space left on device; "
        "what was there is unchanged; make room or choose another place"
    ]
    assert read_tensors(tmp_path / "run/best.safetensors")[1]["step"] == "0"
    results = iter([0.6, 0.7, 0.1])
    assert main([*command, "--resume"]) == 0
    assert read_tensors(tmp_path / "run/best.safetensors")[1]["step"] == "6"


def test_too_little_memory_is_one_line_with_what_would_help(task, models, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")

    command = ["train", models["quantized"], *SMALL, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", full)
        assert main(command) == 2
    [line] = errors(capsys)
    assert "CUDA out of memory; give a smaller --eval-batch-size" in line and not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr("qzo.training.task.put_best", full)  # at the end, where the best state is tested
        assert main(command) == 2
    assert "give a smaller --eval-batch-size" in errors(capsys)[0]
    assert main([*command, "--resume", "--eval-batch-size", "2"]) == 0
