"""The command line: good input gives tables, wrong input one line and exit code 2 with nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main

ROOT = Path(__file__).parents[3]


def truncated_gguf(tmp_path: Path) -> str:
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\x02")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama2-13"], "llama2-13b"),
        (["opt-125m", "--methods", "qlor"], "qlora"),
        (["opt-125m", "--methods", ","], "names no method"),
        (["opt-125m", "--device", "sim", "--gpu", "rtx4090"], "rtx-4090"),
        (["opt-125m", "--device", "tpu"], "unknown device"),
        (["opt-125m", "--batch-size", "0"], "batch_size=0"),
        (["opt-125m", "--batch-size", "two"], "batch-size"),
        (["opt-125m", "--seq-len", "1"], "seq_len=1"),
        (["opt-125m", "--seq-len", "5000"], "2048 positions"),
        (["opt-125m", "--group-size", "100"], "not divisible by group_size=100"),
        (["opt-125m", "--group-size", "0"], "group_size=0"),
        (["opt-125m", "--steps", "2"], "steps=2"),
        (["opt-125m", "--attention", "quick"], "unknown attention"),
        (["gemma2-2b", "--attention", "flash"], "choose eager"),
        (["opt-125m", "--device", "cuda"], "NVIDIA GPU"),
        ([], "model"),
        (["opt-125m", "--fast"], "--fast"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert message in error
    assert not out.exists()


def test_a_folder_without_config_and_a_truncated_gguf_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for model, message in ((str(tmp_path / "empty"), "config.json"), (truncated_gguf(tmp_path), "cut.gguf")):
        assert main(["run", model, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
        assert not (tmp_path / "out").exists()


def test_an_unwritable_output_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["run", "opt-125m", "--device", "sim", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write to")


def test_a_run_writes_records_summary_tables_and_picture(tmp_path):
    command = [sys.executable, "-m", "bench", "run", "opt-125m", "--device", "sim", "--methods", "ft-mixed,qzo"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()  # by us: libraries' notices are not passed on
    assert told and all(line.startswith(("[", "wrote ")) for line in told), told
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ft-mixed.json", "qzo.json", "summary.json", "tables.md", "tables.csv", "memory.png"}
    assert "ft-mixed" in done.stdout and "What fits" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    records = {record["case"]["method"]: record["peak"]["allocated"] for record in summary["records"]}
    assert summary["reductions"]["ft-mixed"]["qzo"]["allocated"] == records["ft-mixed"] / records["qzo"]


def test_records_of_other_settings_do_not_mix_with_new_ones(tmp_path):
    command = [sys.executable, "-m", "bench", "run", "opt-125m", "--device", "sim", "--out", str(tmp_path)]
    for options in (["--methods", "ft-sgd"], ["--methods", "qzo", "--batch-size", "2"]):
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "removing" in done.stderr
    assert not (tmp_path / "ft-sgd.json").exists() and (tmp_path / "qzo.json").exists()
