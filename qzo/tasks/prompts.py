"""From a row in the original field names to examples: one function a task, its prompt inside.

The prompts keep to the manner of MeZO (Malladi et al. 2023): the text, a short question or the start of a sentence, and
label words that go on from it. All of them put the long text first, so that cutting on the left spares the question.
"""

from __future__ import annotations

from qzo.errors import QzoError
from qzo.tasks.example import Example
from qzo.tasks.source.row import Row

FILM = (" terrible", " great")
NO_YES = (" No", " Yes")
YES_NO_MAYBE = (" Yes", " No", " Maybe")
CONNECTIVES = {"cause": "because", "effect": "so"}


def sst2(row: Row) -> list[Example]:
    return [_film(row.get("sentence"), row.label({0: 0, 1: 1}))]


def rotten_tomatoes(row: Row) -> list[Example]:
    return [_film(row.get("text"), row.label({0: 0, 1: 1, "0": 0, "1": 1}))]


def _film(text: str, label: int) -> Example:
    return Example(text.strip(), " It was", FILM, label)


def rte(row: Row) -> list[Example]:
    ask = f'\nQuestion: Does it follow that "{row.get("hypothesis").strip()}"? Yes or No?\nAnswer:'
    label = row.label({"not_entailment": 0, "entailment": 1, 1: 0, 0: 1})
    return [Example(row.get("premise").strip(), ask, NO_YES, label)]


def cb(row: Row) -> list[Example]:
    ask = f'\nQuestion: Does it follow that "{row.get("hypothesis").strip()}"? Yes, No or Maybe?\nAnswer:'
    label = row.label({"entailment": 0, "contradiction": 1, "neutral": 2, 0: 0, 1: 1, 2: 2})
    return [Example(row.get("premise").strip(), ask, YES_NO_MAYBE, label)]


def boolq(row: Row) -> list[Example]:
    question = row.get("question").strip().rstrip("?")
    ask = f"\nQuestion: {question[:1].upper()}{question[1:]}?\nAnswer:"
    return [Example(row.get("passage").strip(), ask, NO_YES, row.label({False: 0, True: 1}))]


def wic(row: Row) -> list[Example]:
    text = f"{row.get('sentence1').strip()}\n{row.get('sentence2').strip()}"
    ask = f'\nQuestion: Does "{row.get("word")}" mean the same in both sentences? Yes or No?\nAnswer:'
    return [Example(text, ask, NO_YES, row.label({False: 0, True: 1}))]


def copa(row: Row) -> list[Example]:
    """The candidates are whole clauses: "The man fell because" is followed by " he slipped." or another."""
    relation = row.get("question")
    if relation not in CONNECTIVES:
        raise QzoError(f'{row.where}: question is "{relation}"; it must be "cause" or "effect"')
    premise = row.get("premise").strip().rstrip(".")
    answers = tuple(f" {_inside_sentence(row.get(name).strip())}" for name in ("choice1", "choice2"))
    return [Example(premise, f" {CONNECTIVES[relation]}", answers, row.label({0: 0, 1: 1}))]


def _inside_sentence(clause: str) -> str:
    first = clause.split(" ", 1)[0]
    return clause if first == "I" or first.startswith("I'") else clause[:1].lower() + clause[1:]


def multirc(row: Row) -> list[Example]:
    """One example for each answer, from a passage with questions inside (SuperGLUE) or from flat rows (hub)."""
    if "passage" not in row.fields:
        idx = row.inner(row.get("idx", dict), "idx")
        group = f"{idx.get('paragraph', int)}/{idx.get('question', int)}"
        return [_answer(row.get("paragraph"), row.get("question"), row, row.get("answer"), group)]
    passage = row.inner(row.get("passage", dict), "passage")
    text, made = passage.get("text"), []
    for number, fields in enumerate(passage.get("questions", list), 1):
        question = passage.inner(fields, f"question {number}")
        for place, inner in enumerate(question.get("answers", list), 1):
            answer = question.inner(inner, f"answer {place}")
            group = f"{row.where}/{number}"
            made.append(_answer(text, question.get("question"), answer, answer.get("text"), group))
    return made


def _answer(text: str, question: str, row: Row, answer: str, group: str) -> Example:
    ask = f'\nQuestion: {question.strip()}\nIs "{answer.strip()}" a right answer? Yes or No?\nAnswer:'
    return Example(text.strip(), ask, NO_YES, row.label({0: 0, 1: 1}), group)


def squad(row: Row) -> list[Example]:
    """The answer is to be written; a new line ends it."""
    answers = row.inner(row.get("answers", dict), "answers").get("text", list)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise QzoError(f"{row.where}: answers have no text; write one, or remove the row")
    ask = f"\nQuestion: {row.get('question').strip()}\nAnswer:"
    return [Example(row.get("context").strip(), ask, tuple(f" {answer.strip()}" for answer in answers), 0)]
