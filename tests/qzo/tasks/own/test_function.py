"""A reward function: found by name, called as TRL calls it, its answer checked."""

import math

import numpy as np
import pytest
import torch

from qzo.errors import QzoError
from qzo.tasks.own.function import RewardFunction, as_function, load_function

ROWS = ["rows.jsonl, line 1", "rows.jsonl, line 2"]


def called(function, columns=None):
    return as_function(function).rewards(["a", "b"], ["x", "yy"], [[1], [2, 3]], columns or {}, ROWS)


def test_it_gets_what_it_names_and_all_of_it_where_it_takes_more():
    seen = {}

    def some(completions, answer):
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    def every(prompts, **columns):
        columns["log_metric"]("length", 1.0)
        seen.update(columns, prompts=prompts)
        return [0, True]

    assert called(some, {"answer": ["x", "y"], "other": [1, 2]}) == [1.0, 0.0]
    assert called(every, {"answer": ["x", "y"]}) == [0.0, 1.0]
    assert seen["prompts"] == ["a", "b"] and seen["completion_ids"] == [[1], [2, 3]] and seen["answer"] == ["x", "y"]


@pytest.mark.parametrize("values", [(1, 0.5), np.array([1, 0.5], np.float32), torch.tensor([1, 0.5]).half()])
def test_numbers_of_any_kind_are_taken(values):
    async def later(**_):
        return values

    assert called(lambda **_: values) == called(later) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        (0.5, "returned 0.5; it must return a list of 2 numbers"),
        (None, "returned None; it must return a list"),
        ("ab", "returned 'ab'; it must return a list"),
        ([1.0, math.nan], "rows.jsonl, line 2: .* returned nan; a reward must be a finite number"),
        ([None, 1.0], "rows.jsonl, line 1: .* returned None; a reward must be a finite number"),
        ([1.0, "2"], "line 2: .* returned '2'"),
        ([math.inf, 1.0], "line 1: .* returned inf"),
        ([1.0, 10**400], "line 2: .* a reward must be a finite number"),
    ],
)
def test_anything_but_a_finite_number_for_each_completion_is_refused(values, message):
    with pytest.raises(QzoError, match=message):
        called(lambda **_: values)


def test_an_exception_names_the_row_whatever_the_function_raises():
    def one(completions):
        return [1 / (len(text) - 2) for text in completions]

    def all_together(completions):
        assert len(completions) == 1, "one at a time"
        return [0.0]

    with pytest.raises(QzoError, match=r"line 2: one raised ZeroDivisionError in line \d+ of .*test_function.py"):
        called(one)
    with pytest.raises(QzoError, match=r"line 1 and 1 more: all_together raised AssertionError.*one at a time"):
        called(all_together)


def test_a_module_of_the_current_folder_and_what_lies_beside_a_file_can_be_imported(tmp_path, monkeypatch):
    (tmp_path / "words_of_mine.py").write_text("LEAST = 3\n")
    (tmp_path / "score_by_words.py").write_text(
        "from words_of_mine import LEAST\nclass Of:\n    @staticmethod\n    def f(completions):\n"
        "        return [LEAST]\n"
    )
    found = load_function(f"{tmp_path / 'score_by_words.py'}:Of.f")
    assert found.call([""]) == [3] and len(found.digest) == 64
    monkeypatch.chdir(tmp_path)
    again = load_function("score_by_words:Of.f")
    assert again.call([""]) == [3] and again.digest == found.digest and as_function(again) is again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "cannot be imported: SyntaxError"),
        ("import nothing_of_that_name\n", "cannot be imported: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)\n", "cannot be imported: SystemExit: 3"),
        ("1 / 0\n", "cannot be imported: ZeroDivisionError"),
        ("f = 1\n", "has no function f; it has no functions at all"),
        ("def f(completions, /):\n    return []\n", None),
    ],
)
def test_a_module_that_cannot_be_used_is_told_in_one_line(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(QzoError, match=message or "takes arguments by position alone") as told:
        load_function(f"{tmp_path / 'broken.py'}:f").check_columns([])
    assert "\n" not in str(told.value)


def test_a_builtin_has_no_source():
    assert RewardFunction(len, "len").digest is None and as_function(len).source is None
