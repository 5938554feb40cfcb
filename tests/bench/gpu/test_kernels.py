"""Kernels in Triton measured beside operators: the dry run, and by Triton's interpreter what a GPU would run."""

import json

import pytest
import torch

from bench.gpu import kernels
from bench.gpu.layers import FORMATS

WAYS = ["dense", "operators", "rebuilt", "codes", "both"]


def rows_of(out, *arguments):
    assert kernels.main(["--device", "cpu", "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def test_the_dry_run_measures_what_a_cpu_has(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", ((32, 64),))
    monkeypatch.setattr(kernels, "TOKENS", (1, 3))
    found = rows_of(tmp_path / "kernels.json")
    assert [row["format"] for row in found["rows"]] == list(FORMATS) and found["tokens"] == {}
    for row in found["rows"]:
        assert row["status"] == "ok" and [entry["tokens"] for entry in row["tokens"]] == [1, 3]
        assert all(list(entry["seconds"]) == WAYS[:2] and entry["limit"] > 0 for entry in row["tokens"])
    assert rows_of(tmp_path / "kernels.json", "--seconds", "-1") == found  # none was started, and none is lost


@pytest.mark.parametrize("name", ["gptq-4-order", "gguf-q4_1", "nf4"])
def test_kernels_are_held_to_the_operators_where_they_are_timed(name, tmp_path, monkeypatch):
    from triton_kernels import on_the_cpu

    monkeypatch.setattr(kernels, "SHAPES", ((32, 64),))
    monkeypatch.setattr(kernels, "TOKENS", (1, 3))
    monkeypatch.setattr(kernels, "DTYPE", torch.float16)  # the interpreter cannot multiply bf16
    with on_the_cpu():
        found = rows_of(tmp_path / "kernels.json", "--formats", name)
    (row,) = found["rows"]
    assert row["same_bits"] and found["tokens"].keys() == {name}
    for entry in row["tokens"]:
        assert list(entry["seconds"]) == WAYS
        assert all(entry["far"][way] < 1e-3 for way in ("dense", "rebuilt", "codes"))
        assert entry["far"]["both"] < 1e-2  # by scales that are moved by a thousandth of themselves


def test_codes_are_chosen_up_to_the_first_number_of_tokens_at_which_any_shape_is_slower():
    def row(shape, *codes):
        timed = zip((1, 16, 64), codes, strict=True)
        entries = [{"tokens": tokens, "seconds": {"codes": seconds, "rebuilt": 2}} for tokens, seconds in timed]
        return {"format": "awq", "shape": shape, "tokens": entries}

    assert kernels.crossings([row(1, 1, 2, 3), row(2, 1, 1, 1)]) == {"awq": 16}
    assert kernels.crossings([row(1, 3, 1, 1)]) == {"awq": 0}


def test_a_kernel_that_fails_is_told_and_the_others_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", ((32, 64), (32, 33), (32, 128)))  # no format has 33 columns
    monkeypatch.setattr(kernels, "TOKENS", (1,))
    arguments = ["--device", "cpu", "--formats", "awq", "--out", str(tmp_path / "kernels.json")]
    assert kernels.main(arguments) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "error", "ok"] and "33" in rows[1]["message"]
