"""Scores of answers and labels, as the published scripts have them."""

import pytest

from qzo.tasks import metrics
from qzo.tasks.example import Example


@pytest.mark.parametrize(
    ("text", "answer", "em", "f1"),
    [
        ("The Eiffel-Tower!", "eiffeltower", 1, 1.0),
        ("an  apple a day", "apple day", 1, 1.0),
        ("Anthem", "them", 0, 0.0),  # articles are whole words
        ("1,000 km", "1000 KM.", 1, 1.0),
        ("big red dog", "the red dog", 0, 0.8),
        ("dog dog dog", "dog", 0, 0.5),  # a word counts as often as it stands there
        ("the", "a", 1, 0.0),  # nothing is left of both: official F1 is 0
        ("", "dog", 0, 0.0),
        ("naïve café", "Naïve Café", 1, 1.0),
    ],
)
def test_squad_normalisation(text, answer, em, f1):
    example = Example("", "", (f" {answer}",), 0)
    scores = metrics.answers_f1_and_exact_match([example], [text])
    assert scores["em"] == em and scores["f1"] == pytest.approx(f1)


def test_squad_takes_the_best_of_several_answers():
    example = Example("", "", (" wrong", " red dog", " dog"), 0)
    scores = metrics.answers_f1_and_exact_match([example, example], ["a dog", "red cat"])
    assert scores == {"f1": pytest.approx(0.75), "em": 0.5}


def test_f1_of_cb_and_multirc():
    cb = [Example("", "", (" a", " b", " c"), label) for label in (0, 0, 1, 1)]
    assert metrics.accuracy_and_macro_f1(cb, [0, 1, 1, 1]) == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 0.8) / 2)}
    assert metrics.accuracy_and_macro_f1(cb, [0, 0, 1, 2])["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    multirc = [
        Example("", "", (" No", " Yes"), label, group) for label, group in ((1, "p"), (0, "p"), (1, "q"), (0, "q"))
    ]
    scores = metrics.f1_and_exact_match(multirc, [1, 0, 0, 0])
    assert scores == {"f1": pytest.approx(2 / 3), "em": 0.5, "accuracy": 0.75}
    assert metrics.f1_and_exact_match(multirc, [0, 0, 0, 0])["f1"] == 0.0
