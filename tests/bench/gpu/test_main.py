"""All that `make gpu` runs, dry on a CPU: parts with time limits, and the two that are not tested elsewhere."""

import json
import sys
import time
from pathlib import Path

from bench.gpu import __main__ as session
from bench.gpu import events, facts, journal, seconds
from qzo.kernels import native

METHODS = [seconds.FORWARDS, "qzo", seconds.BY_KERNELS, "mezo-reference"]


def python(code):
    return lambda out, device: ["-c", code]


def test_parts_run_in_order_and_a_late_one_is_ended_with_what_it_started(monkeypatch, tmp_path, capfd):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = (
        session.Part("first", 60, python("print('one', flush=True)")),
        session.Part("late", 2, python(child)),
        session.Part("wrong", 60, python("raise SystemExit(3)")),
        session.Part("last", 60, python("print('four', flush=True)")),
    )
    monkeypatch.setattr(session, "PARTS", parts)
    start = time.monotonic()
    assert session.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 60
    out = capfd.readouterr().out
    assert out.index("one") < out.index("late: out of time") < out.index("wrong: exit code 3") < out.index("four")
    assert session.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "first,last"]) == 0


def test_bad_input_is_one_line_and_two(monkeypatch, tmp_path, capsys):
    assert session.main(["--parts", "fact", "--device", "cpu"]) == 2
    assert "choose from facts" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert session.main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_files_bear_the_name_of_the_card(tmp_path):
    commands = {part.name: part.command(tmp_path, "cpu") for part in session.PARTS}
    assert str(tmp_path / "cpu.seconds.json") in commands["seconds"]
    assert str(tmp_path) in commands["memory"]
    assert "--collect-only" in commands["tests"]
    assert all(command[0] == "-m" for command in commands.values())
    assert sys.executable not in commands["facts"]


def test_seconds_are_written_method_by_method(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(seconds, "SHAPES", ((1, 16), (2, 16)))
    out = tmp_path / "seconds.json"
    arguments = [
        "--device",
        "cpu",
        "--models",
        str(llama_folder),
        "--methods",
        ",".join(METHODS),
    ]
    assert seconds.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == METHODS
    for row in rows:
        assert row["status"] == "ok" and [shape["batch_size"] for shape in row["shapes"]] == [1, 2]
        assert all(0 < shape["median"] < 60 for shape in row["shapes"])
    more = ["--add", "--most-tokens", "0,64", "--methods", f"{seconds.BY_KERNELS},qzo"]
    assert seconds.main([*arguments, *more, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["sessions"]) == 2 and found["rows"][: len(rows)] == rows
    added = [(row["session"], row["method"], row.get("most_tokens")) for row in found["rows"][len(rows) :]]
    assert added == [(2, seconds.BY_KERNELS, 0), (2, seconds.BY_KERNELS, 64), (2, "qzo", None)]
    assert seconds.main(["--device", "cpu", "--models", str(llama_folder), "--seconds", "-1", "--out", str(out)]) == 0


def test_a_method_that_fails_is_told_and_the_others_are_measured(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(seconds, "SHAPES", ((1, 4096),))  # more tokens than the model has positions
    out = tmp_path / "seconds.json"
    assert (
        seconds.main(["--device", "cpu", "--models", str(llama_folder), "--methods", "qzo,mezo", "--out", str(out)])
        == 1
    )
    assert [row["status"] for row in json.loads(out.read_text())["rows"]] == ["error", "error"]


def test_facts_without_a_gpu_are_the_environment(tmp_path):
    assert facts.main(["--device", "cpu", "--out", str(tmp_path / "facts.json")]) == 0
    assert set(json.loads((tmp_path / "facts.json").read_text())) == {"environment"}


def test_the_committed_journal_of_an_h100_is_replayed_here_to_the_same_bits(capsys):
    (file,) = Path("reports/measurements").glob("*.journal.json")
    assert json.loads(file.read_text())["device"] == "cuda"
    assert journal.main(["--device", "cpu", "--replay", str(file)]) == 0
    assert "40 steps of cuda on cpu: the same bits" in capsys.readouterr().out


def test_a_journal_is_replayed_to_the_bits_it_was_written_with(tmp_path, capsys):
    out = tmp_path / "journal.json"
    again = ["--device", "cpu", "--replay", str(out)]
    assert journal.main(["--device", "cpu", "--out", str(out)]) == 0
    with native.by_operators():
        assert journal.main(again) == 0 and "the same bits" in capsys.readouterr().out
    written = json.loads(out.read_text())
    header, *steps = written["journal"].splitlines()
    assert len(steps) == journal.STEPS and json.loads(header.rpartition(" ")[0])["estimator"]["noise"] == "philox"
    out.write_text(json.dumps(written | {"masters": "others"}))
    assert journal.main(again) == 1 and "OTHER BITS" in capsys.readouterr().out
    out.write_text(json.dumps(written | {"journal": written["journal"].replace("philox", "philax")}))
    assert journal.main(again) == 2 and capsys.readouterr().err.count("\n") == 1


def test_events_of_a_cell_are_those_of_its_ledger_where_there_is_no_allocator(llama_folder, tmp_path):
    out = tmp_path / "events.json"
    assert events.main(["--device", "cpu", "--cells", f"{llama_folder}:qzo", "--out", str(out)]) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["method"] == "qzo" and cell["allocator"] == []
    assert set(cell["ledger"]) == {"perturb", "forward-plus", "forward-minus", "update"}
