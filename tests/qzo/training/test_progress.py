"""What a run shows: a line every half minute without a terminal, and a bar that fits into 80 columns."""

import re
import sys
import types

import pytest

from qzo.training.telemetry.progress import SILENCE, Progress, lines_of


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def outcome(loss=0.69314, slope=-12345.6):
    return types.SimpleNamespace(loss=loss, slope=slope, clipped=True, skipped=False)


def test_without_a_terminal_a_line_every_half_minute_tells_steps_and_time(capsys):
    clock = Clock()
    progress = Progress(100, start=10, clock=clock)
    for step in range(11, 31):
        clock.now += 6
        progress.step(step, outcome(), 1e-5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {step} of 100" for step in (15, 20, 25, 30)]
    assert lines[0].endswith("train loss 0.6931  d -1.23e+04  clipped 100%  0:00:30 spent, 0:08:30 left")


def test_a_long_validation_is_told_and_its_result_is_a_line(capsys):
    clock = Clock()
    progress = Progress(100, clock=clock)
    progress.validating(16, 500)
    clock.now += SILENCE
    progress.validating(32, 500)
    progress.validating(48, 500)
    progress.validation(0, {"accuracy": 0.5, "loss": 0.7, "count": 500, "predictions": {}}, True)
    assert capsys.readouterr().err.splitlines() == [
        "validation: 32 of 500 examples  0:00:30 spent",
        "step 0  validation accuracy 0.5000  validation loss 0.7000  best",
    ]


def test_a_test_tells_how_far_it_is(capsys):
    clock = Clock()
    watch = lines_of("test", clock)
    for done in (16, 32, 48):
        clock.now += 20
        watch(done, 1000)
    assert capsys.readouterr().err.splitlines() == ["test: 32 of 1,000 examples"]


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_the_bar_keeps_count_and_time_left_in_front_and_names_its_loss(monkeypatch, capsys, columns):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(20000)
    progress.validating(16, 500)
    for step in range(1, 4):
        progress.step(step, outcome(), 1e-5)
    progress.validation(3, {"accuracy": 0.5, "loss": 0.7}, True)
    progress.close()
    shown = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err))
    bar = next(line for line in reversed(shown) if "3/20000" in line)
    assert re.match(r" +3/20000 (━+ )?(-:--:--|\d+:\d\d:\d\d) train loss 0.6931", bar) and len(bar) <= columns
    assert ("clipped 100%" in bar) == (columns == 80)
    words = " ".join(" ".join(shown).split())  # the line is broken where it does not fit
    assert "step 3 validation accuracy 0.5000 validation loss 0.7000 best" in words
