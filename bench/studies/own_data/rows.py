"""Small files of the five kinds, of real film snippets and made-up replies: short rows, so that a run takes minutes."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qzo.durable import replace_file
from qzo.tasks.source.reviews import review_rows

KINDS = ("classes", "completions", "chats", "preferences", "text")
NAMES = {
    "classes": "snippets.csv",
    "completions": "completions.jsonl",
    "chats": "chats.jsonl",
    "preferences": "preferences.jsonl",
    "text": "snippets.txt",
}
ROWS, ASKED = 400, 8  # of a file; that are kept apart, to be asked afterwards
LINES = 1200  # of the text file, ten a paragraph
SHORT, LONG = 30, 64  # characters of a snippet
OPENINGS = (
    "when did they show", "where can i see", "who wrote", "who directed", "how long is", "is there a sequel to",
    "who stars in", "who made the music of", "in which year did they shoot", "what happens in", "what language is",
    "which studio paid for", "who edited", "what do tickets cost for",
)  # fmt: skip
FILMS = (
    "the old harbour", "seven winters", "a train to lisbon", "the glass orchard", "night ferry", "small hours",
    "the cartographer", "paper lanterns", "north of here", "the last reel",
)  # fmt: skip
VERDICTS = {"1": "good", "0": "bad"}
SYSTEM = {"role": "system", "content": "You answer people."}  # shorter than what the template says without one
REPLIES = {"1": "We are glad that you liked it!", "0": "We are sorry that you did not like it."}


def write(kind: str, folder: Path) -> Path:
    """Write the file of a kind; the same at every call."""
    text = {"classes": _classes, "text": _text}.get(kind, lambda: _lines(kind))()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAMES[kind]
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8", newline=""))
    return file


def asked(kind: str) -> list[dict[str, Any]]:
    """What the model is asked after training, of rows that no file holds: {"text": ...} or {"messages": [...]}."""
    rows = _snippets()[ROWS : ROWS + ASKED]
    if kind == "text":
        return [{"text": " ".join(row["text"].split()[:4])} for row in rows]
    if kind == "classes":
        return [{"text": f"{row['text']}\nLabel:"} for row in rows]
    made = [_row(kind, row) for row in rows]
    return [{"messages": row["messages"][:-1]} if kind == "chats" else {"text": row["prompt"]} for row in made]


def _row(kind: str, row: dict[str, str]) -> dict[str, Any]:
    text, label, other = row["text"], row["label"], "10"[int(row["label"])]
    if kind == "completions":
        return {"prompt": f"{text}\nStars:", "completion": f" {'4' if label == '1' else '2'} of 5"}
    if kind == "preferences":
        return {"prompt": f"{text}\nReply:", "chosen": f" {REPLIES[label]}", "rejected": f" {REPLIES[other]}"}
    told = {"role": "assistant", "content": REPLIES[label]}
    return {"messages": [SYSTEM, {"role": "user", "content": text}, told]}


def _lines(kind: str) -> str:
    return "".join(f"{json.dumps(_row(kind, row))}\n" for row in _snippets()[:ROWS])


def _classes() -> str:
    """Two thirds are snippets by what they say of a film, one third are questions."""
    dice = random.Random("questions")
    known = [f"{opening} {film} ?" for opening in OPENINGS for film in FILMS]
    questions = dice.sample(known, ROWS // 3)  # no text twice: all of its rows would go into one split
    rows = [(row["text"], VERDICTS[row["label"]]) for row in _snippets()[: ROWS - len(questions)]]
    rows += [(question, "question") for question in questions]
    dice.shuffle(rows)
    opened = io.StringIO()
    csv.writer(opened).writerows([("text", "label"), *rows])
    return opened.getvalue()


def _text() -> str:
    dice = random.Random("text")
    lines = [row["text"] for row in dice.sample(_reviews(), LINES)]
    return "\n\n".join("\n".join(lines[start : start + 10]) for start in range(0, LINES, 10)) + "\n"


def _snippets() -> Sequence[dict[str, str]]:
    """As many of each opinion, in turn."""
    dice = random.Random("snippets")
    short = [row for row in _reviews() if SHORT <= len(row["text"]) <= LONG]
    dice.shuffle(short)
    sides = [[row for row in short if row["label"] == label] for label in VERDICTS]
    return [row for pair in zip(*sides, strict=False) for row in pair]


@cache
def _reviews() -> list[dict[str, str]]:
    return review_rows()
