"""`qzo report`: one page that loads nothing and runs nothing, whatever the run is called; damage told in one line."""

import json
import re
import shlex
from importlib.metadata import EntryPoint

import pytest
from run_folders import EVIL, Page, facts, put, scores, write_run

from qzo.commands.data import own_data
from qzo.commands.main import _parser, main
from qzo.training.presets import PRESETS
from qzo.training.settings import TrainSettings


def report(run, *options):
    return main(["report", str(run), "--no-peaks", *map(str, options)])


def page_of(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Matplotlib takes longer to import than all of this; one test draws."""
    monkeypatch.setattr("qzo.report.picture.find_spec", lambda name: None)


def test_the_page_holds_no_reference_and_no_markup_of_anybody_elses(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert report(run) == 0
    page = page_of(run)
    assert page.sound and "curves.png was not made" in capsys.readouterr().err
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a", "image", "use"}
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "xlink:href", "action", "onerror"} & attributes.keys()
    policy = next(meta["content"] for meta in page.named("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    style = re.search("<style>(.*?)</style>", (run / "report.html").read_text(), re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert page.text.count("<script src=//evil.example/x.js>") >= 8 and "\u202e" not in page.text  # shown, as text
    assert "\\u202e" in page.text


def test_the_page_tells_curves_baseline_figures_memory_and_data(tmp_path):
    run = write_run(tmp_path / "run")
    assert report(run) == 0
    page = page_of(run)
    for words in (
        "finished",
        "60 of 60 steps",
        "before: 70.0 %",
        "120",
        "this run, QZO",
        "700.0 MiB",
        "texts with labels",
    ):
        assert words in page.text, words
    drawn = [svg["aria-label"].split(":")[0] for svg in page.named("svg")]
    assert drawn == ["Loss", "Validation accuracy", "Directional derivative d", "Share of steps clipped"]
    assert sum(line.get("class") == "baseline" for line in page.named("line")) == 2
    assert sum(circle.get("class") == "mark" for circle in page.named("circle")) == 8  # of loss and accuracy
    assert len([table for table in page.named("table") if table.get("class") == "matrix"]) == 3


def test_the_test_stands_beside_what_it_gave_before_training_and_a_reward_says_what_it_is(tmp_path):
    run = write_run(tmp_path / "run", scheduler="linear")
    known = {**facts(), "test": scores(0), "keep_weights": True}
    put(run / "facts.json", {**known, "data": {**known["data"], "reward": "score.py:f, greedy"}})
    about = json.loads((run / "run.json").read_text())
    put(run / "run.json", {**about, "reward": "score.py:f"})
    assert report(run) == 0
    page = page_of(run)
    for words in ("test accuracy", "before: 70.0 %, 20 rows", "test, before training", "score.py:f, greedy"):
        assert words in page.text, words
    assert "what the model writes in brackets" in page.text and "legs" not in page.text
    assert "Train on, to 120 steps" in page.text and "--keep-weights" in page.text


def test_the_command_to_go_on_is_read_back_as_the_settings_of_the_run(tmp_path):
    options = {"method": "mezo", "relative": False, "clip_threshold": 5.0, "layers": "1-2", "seed": 3}
    auto = {**PRESETS["auto"], "preset": "auto", "steps": 99, "normalize": False, "directions": 2}
    for number, more in enumerate([{}, {"clip_threshold": float("inf"), "estimator": "one-sided"}, options, auto]):
        run = write_run(tmp_path / f"run {number}", taken=40, **more)
        assert report(run) == 0
        lines = re.findall(r"qzo train .*? --resume", page_of(run).text.replace("\\u202e", "\u202e"), re.DOTALL)
        parsed = _parser().parse_args(shlex.split(lines[0])[1:])
        named = {name: value for name, value in vars(parsed).items() if name in TrainSettings.__dataclass_fields__}
        about = json.loads((run / "run.json").read_text())
        named = {**PRESETS[named["preset"]], **named}
        assert TrainSettings(**named).to_json() == about["settings"]
        assert parsed.resume and parsed.out == str(run) and parsed.model == about["model"] and parsed.device == "cpu"
        own = own_data(parsed)
        assert own.data == about["data"] and own.columns == about["columns"]


@pytest.mark.parametrize("method", ["mezo", "lora", "ft"])
def test_a_run_of_another_method_is_shown(tmp_path, method):
    run = write_run(tmp_path / "run", method=method, lr=None, relative=False, eps=1e-3)
    assert report(run) == 0
    drawn = [svg["aria-label"].split(":")[0] for svg in page_of(run).named("svg")]
    slope = ["Directional derivative d"] if method == "mezo" else ["Norm of the gradient", "Share of steps clipped"]
    assert drawn == ["Loss", "Validation accuracy", *slope]  # MeZO has no bound


def test_an_interrupted_run_tells_where_it_goes_on_and_nothing_of_an_earlier_end(tmp_path):
    run = write_run(tmp_path / "run", taken=37)
    put(run / "result.json", {"steps": 20, "stopped_early": False, "test": {"accuracy": 0.9}})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 38, "lo')  # of a kill, or just being written
    before = (run / "metrics.jsonl").read_bytes()
    assert report(run) == 0 and (run / "metrics.jsonl").read_bytes() == before
    text = page_of(run).text
    assert "interrupted" in text and "37 of 60 steps" in text and "Go on after step 0" in text  # no journal was written
    assert "test accuracy" not in text


def test_a_run_without_steps_validations_facts_or_data_is_a_page(tmp_path):
    run = write_run(tmp_path / "run", taken=0)
    for name in ("metrics.jsonl", "facts.json"):
        (run / name).unlink()
    put(run / "run.json", {"qzo_run": 1, "settings": {"method": "qzo"}})
    assert report(run) == 0
    text = page_of(run).text
    assert "No step was taken yet." in text and "none was recorded" in text and "does not tell its data" in text


def test_thousands_of_steps_make_a_page_of_bounded_size(tmp_path):
    run = write_run(tmp_path / "run", taken=6000, every=1500, steps=6000)
    assert report(run) == 0
    assert (run / "report.html").stat().st_size < 150_000
    assert [polygon["class"] for polygon in page_of(run).named("polygon")] == ["area", "area"]


def test_both_files_are_written_or_neither(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    run = write_run(tmp_path / "run")
    assert report(run, "--out", tmp_path / "page.html") == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    old = {name: (tmp_path / name).read_bytes() for name in ("page.html", "curves.png")}
    monkeypatch.setattr("qzo.report.writing.replace_file", _full_disk("curves.png"))
    put(run / "facts.json", {})
    assert report(run, "--out", tmp_path / "page.html") == 2
    assert {name: (tmp_path / name).read_bytes() for name in old} == old
    assert "could not be written: No space left on device" in capsys.readouterr().err


def _full_disk(name):
    from qzo.durable import replace_file

    def replace(path, write):
        def fail(partial):
            write(partial)
            if path.name == name:
                raise OSError(28, "No space left on device")

        replace_file(path, fail)

    return replace


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", "is not the folder of a run"),
        (
            "run.json",
            '{"qzo_run": 1, "settings": {"method": "qzo", "steps": "many"}}',
            "settings of run.json cannot be",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": 1}\n{"step": 0}\n', "line 2 cannot be read"),
        ("facts.json", "[1]", "facts.json cannot be read: it is no object"),
        ("result.json", "\x00", "result.json cannot be read"),
        ("run.journal", "x", "is not a journal of qzo"),
    ],
)
def test_a_damaged_run_is_one_line_and_no_page(tmp_path, capsys, file, content, message):
    run = write_run(tmp_path / "run")
    (run / file).write_text(content)
    assert report(run) == 2 and not (run / "report.html").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("file", ["facts.json", "result.json", "run.json"])
def test_values_of_any_other_kind_are_told_or_left_out(tmp_path, capsys, file):
    run = write_run(tmp_path / "run")
    content = json.loads((run / file).read_text())
    values = (None, EVIL, -1, [[]], {"a": {"b": None}}, float("inf"))
    for number, path in enumerate(_paths(content)):
        for value in (values[number % 6], values[(number + 2) % 6]):
            put(run / file, _changed(content, path, value))
            assert report(run) in (0, 2), (path, value)


def _paths(content, path=()):
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _paths(value, (*path, key))


def _changed(content, path, value):
    return {key: (value if len(path) == 1 else _changed(old, path[1:], value)) if key == path[0] else old
            for key, old in content.items()}  # fmt: skip


def test_other_methods_stand_beside_the_run_where_somebody_simulates_them(tmp_path, monkeypatch, capsys):
    case, roles = {"method": "ft-amp", "gpu": "cpu"}, {"weights": 2**30, "gradients": 2**30}
    sound = {"case": case, "world": "simulated", "status": "ok", "message": None, "at_peak": roles}
    asked = []

    def ask(*arguments):
        asked.append(arguments)
        yield sound
        yield {**sound, "case": {**case, "method": "lora"}, "status": "oom", "message": EVIL}

    run = write_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("qzo.report.peaks._simulator", lambda: ask)
        assert main(["report", str(run)]) == 0
    assert asked == [(f"/models/{EVIL}.gguf", "qzo", 16, 34, "cpu", None)]
    text = page_of(run).text
    assert "full, 16 bytes a parameter" in text and "2.00 GiB" in text and "simulated, CPU" in text and "oom: " in text
    for gone in ([], [EntryPoint("a", "qzo.no_such:peaks", "g")], [EntryPoint("a", "qzo.report.peaks:gone", "g")]):
        monkeypatch.setattr("qzo.report.peaks.entry_points", lambda gone=gone, **_: gone)
        assert main(["report", str(run)]) == 0 and "Not simulated: install the checkout" in page_of(run).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", "0"], "--examples 0 must be at least 1"),
        (["--out", "nowhere/page.html"], "--out nowhere/page.html: there is no such folder"),
        (["--out", "curves.png"], "is the name of the picture"),
        (["--examples", "2"], "was begun on /models/"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, options, message):
    assert report(write_run(tmp_path / "run"), *options) == 2
    assert message in capsys.readouterr().err
