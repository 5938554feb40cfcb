"""Records of measured cells as measurements."""

import json

import pytest

from bench.__main__ import main
from bench.cases.case import BenchCase
from bench.validation import recorded
from bench.validation.compare import CARDS_GIB
from bench.validation.measurement import read_rows
from bench.worlds import cpu
from qzo.errors import QzoError


@pytest.fixture(scope="module")
def measured(llama_folder):
    return {
        method: cpu.run(BenchCase(str(llama_folder), method, device="cpu", seq_len=64, steps=3))
        for method in ("ft-mixed", "qzo")
    }


@pytest.mark.parametrize("method", ["ft-mixed", "qzo"])
def test_a_measured_record_is_predicted_from_its_own_case(measured, method):
    figures, predicted = recorded.figures(measured[method]), recorded.predict(measured[method])
    assert predicted["allocated"] == pytest.approx(figures["allocated"], rel=0.02)
    assert predicted["forward"] == pytest.approx(figures["forward"], rel=0.02)
    assert "process" in figures and "process" not in predicted  # simulated CPUs have no process


def test_the_phases_of_a_zeroth_order_step_are_its_forwards_and_what_is_between(measured):
    figures = recorded.figures(measured["qzo"])
    phases = {phase["name"]: phase["peak_allocated"] for phase in measured["qzo"]["phases"]}
    assert figures["forward"] == max(phases["forward-plus"], phases["forward-minus"])
    assert figures["step"] == max(phases["perturb"], phases["update"])
    assert "backward" not in figures


def test_the_simulated_case_is_the_measured_one(measured):
    case = recorded.simulated_case(measured["qzo"])
    assert (case.method, case.seq_len, case.device, case.gpu, case.group_size) == ("qzo", 64, "sim", "cpu", 128)
    on_gpu = measured["qzo"] | {
        "world": "measured-cuda", "case": measured["qzo"]["case"] | {"gpu": "NVIDIA H100 80GB HBM3"}
    }  # fmt: skip
    assert recorded.simulated_case(on_gpu).gpu == "h100-80gb"


def test_a_simulated_record_is_no_measurement(measured):
    with pytest.raises(QzoError, match="no measurement"):
        recorded.simulated_case(measured["qzo"] | {"world": "simulated"})


def test_validate_compares_records_and_counts_what_it_cannot_predict(measured, tmp_path, capsys):
    other = measured["qzo"] | {"world": "measured-cuda", "case": measured["qzo"]["case"] | {"gpu": "Voodoo 2"}}
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in (measured["qzo"], other)))
    assert main(["validate", str(path), "--json", str(tmp_path / "out.json")]) == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["ok", "error"]
    assert report["statistics"]["allocated"]["worst_abs_percent"] < 2
    assert "process" not in report["statistics"]
    assert report["verdicts"] == {"asked": len(CARDS_GIB), "wrong": len(CARDS_GIB)}  # of the row not predicted
    assert "Voodoo" in capsys.readouterr().out


def test_a_damaged_record_is_told_with_its_line(measured, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(measured["qzo"]) + "\n" + json.dumps(measured["qzo"] | {"world": "imagined"}))
    with pytest.raises(QzoError, match=r"line 2.*world"):
        read_rows(path)
