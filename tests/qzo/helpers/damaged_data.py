"""Data files as users have them that cannot be trained on, each with what its error must say."""

from __future__ import annotations

import codecs
import gzip
import json
from typing import Any

from own_files import chat, completion, lines, preference, ticket

TICKETS, CHATS = [ticket(n) for n in range(12)], [chat(n) for n in range(9)]
COMPLETIONS, PAIRS = [completion(n) for n in range(9)], [preference(n) for n in range(9)]
USER = {"role": "user", "content": "Hi"}


def with_row(rows: list[dict], number: int, **changed: Any) -> bytes:
    """JSON lines in which one row is changed; None takes a field away."""
    row = {name: value for name, value in {**rows[number - 1], **changed}.items() if value is not None}
    return lines([*rows[: number - 1], row, *rows[number:]]).encode()


def with_line(rows: list[dict], number: int, line: str) -> bytes:
    """JSON lines of which one is another text."""
    texts = lines(rows).splitlines()
    return ("\n".join([*texts[: number - 1], line, *texts[number:]]) + "\n").encode()


def said(**turn: Any) -> bytes:
    """Conversations of which the first turn of the seventh is this one."""
    return with_row(CHATS, 7, messages=[turn, *CHATS[6]["messages"]])


DAMAGED = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "empty.csv": (b"", "is empty"),
    "header.csv": (b"text,label\n", "has no row below its header"),
    "empty.txt": (b" \n", "is empty"),
    "latin.csv": (b"text,label\nfine,a\ncaf\xe9,b\n", "line 3 is not UTF-8 (byte 0xe9, column 4)"),
    "latin.jsonl": (lines(TICKETS[:2]).encode() + b'{"text": "caf\xe9"}', "line 3 is not UTF-8"),
    "mark.jsonl": (codecs.BOM_UTF16_LE + b"{", "begins like UTF-16 and is not"),
    "garbage.jsonl": (bytes(range(256)) * 9, "line 1 holds zero bytes; it is no text file"),
    "garbage.csv": (b"\x89PNG\r\n\x1a\n\0\0", "line 1 is not UTF-8"),
    "cut.jsonl": (lines(TICKETS).encode()[:-9], "line 12 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1 is [1]; it must be a JSON object, one a line"),
    "deep.json": (b"[" * 100_000, "is not JSON"),
    "object.json": (b'{"rows": 1}', 'is {"rows": 1}; it must be a list of objects'),
    "long.jsonl": (b'{"text": "' + b"x" * 10_000_000 + b'"}', "line 1 has more than 4,194,304 characters"),
    "bomb.jsonl.gz": (gzip.compress(b"\n" * 1_100_000), "has more than 1,000,000 lines"),
    "ragged.csv": (b"text,label\na,b\nc,d,e\n", "line 3 has 3 values under a header of 2"),
    "quote.csv": (b'text,label\na,"b\nc,d\n', "cannot be read as a table"),
    "twice.csv": (b"text,text\na,b\n", 'has two columns "text"'),
    "field.jsonl": (with_row(TICKETS, 7, label=None), 'line 7 has no field "label"'),
    "nan.jsonl": (with_row(TICKETS, 7, label=float("nan")), 'line 7: "label" is NaN'),
    "list-label.jsonl": (with_row(TICKETS, 7, label=["a"]), 'line 7: "label" is ["a"]'),
    "number.jsonl": (with_row(TICKETS, 7, text=3), 'line 7: field "text" is 3; it must be of type str'),
    "one-class.jsonl": (
        lines([{**row, "label": "x"} for row in TICKETS]).encode(),
        'have the label "x"; two different',
    ),
    "names.jsonl": (
        lines([{"question": "a", "answer": "b"}]).encode(),
        'has the fields "question", "answer"; needed are',
    ),
    "unpaired.jsonl": (lines([{**COMPLETIONS[0], "label": True}]).encode(), "TRL calls unpaired preference"),
    "blank.jsonl.gz": (gzip.compress(with_row(COMPLETIONS, 7, completion=" ")), 'line 7: "completion" is empty'),
    "mixed.jsonl": (with_row(COMPLETIONS, 7, completion=[USER]), 'line 7: "prompt" and "completion" must both be text'),
    "no-content.jsonl": (with_row(CHATS, 7, messages=[{"role": "user"}]), "line 7, messages 1: "),
    "role.jsonl": (with_row(CHATS, 7, messages=[{"role": "robot", "content": "x"}]), 'the role "robot" is not known'),
    "silent.jsonl": (with_row(CHATS, 7, messages=[USER]), 'line 7: "messages" has no turn of the role "assistant"'),
    "text.jsonl": (
        with_row(CHATS, 7, messages="hello"),
        'line 7: field "messages" is "hello"; it must be of type list',
    ),
    "image.jsonl": (
        with_row(CHATS, 7, messages=[{"role": "user", "content": [{"type": "image"}]}]),
        "only text is trained here",
    ),
    "same.jsonl": (with_row(PAIRS, 7, rejected=" a heron 6"), 'line 7: "chosen" and "rejected" are the same'),
    "table.xlsx": (b"PK\3\4", "is no data file; known are *.jsonl"),
    "table.parquet": (b"nothing", "table.parquet"),
    "mark-alone.csv": (codecs.BOM_UTF8, "is empty"),
    "utf-16.csv": ("text,label\nfine,a\n".encode("utf-16-le"), "line 1 holds zero bytes"),
    "utf-32.jsonl": (lines(TICKETS).encode("utf-32"), "is UTF-32; save the file as UTF-8"),
    "windows.txt": (b"He said \x93no\x94.\n", "line 1 is not UTF-8 (byte 0x93, column 9)"),
    "zero.txt": (b"a\nb\0c\n", "line 2 holds zero bytes"),
    "array.jsonl": (
        json.dumps(TICKETS).encode(),
        "it must be a JSON object, one a line; a list of objects is a .json file",
    ),
    "pretty.jsonl": (json.dumps(TICKETS[0], indent=2).encode(), "line 1 is not JSON"),
    "comma.jsonl": (with_line(TICKETS, 7, '{"text": "a", "label": "b",}'), "line 7 is not JSON"),
    "quotes.jsonl": (with_line(TICKETS, 7, "{'text': 'a', 'label': 'b'}"), "line 7 is not JSON"),
    "twice.jsonl": (
        with_line(TICKETS, 7, '{"text": "a", "label": "b", "text": "c"}'),
        "line 7: 'text' stands there twice",
    ),
    "surrogate.jsonl": (
        with_line(TICKETS, 7, '{"text": "a \\ud800", "label": "b"}'),
        "line 7 holds half a character, \\ud800 alone",
    ),
    "digits.jsonl": (with_line(TICKETS, 7, '{"text": "a", "label": ' + "9" * 5000 + "}"), "line 7 is not JSON"),
    "splits.json": (json.dumps({"train": TICKETS, "test": TICKETS}).encode(), "it must be a list of objects"),
    "entry.json": (json.dumps([*TICKETS[:6], {"text": "a"}]).encode(), 'entry 7 has no field "label"'),
    "header-less.csv": (b"fine,good\nawful,bad\n", 'has the fields "fine", "good"; needed are'),
    "no-label.csv": (b"text,label\nfine,good\nawful,\nso so,good\nx,bad\n", 'line 3: "label" is ""'),
    "no-text.csv": (b"text,label\nfine,good\n,bad\n", 'line 3: "text" is empty'),
    "short.csv": (b"text,label\nfine,good\nawful\n", "line 3 has 1 values under a header of 2"),
    "rows.csv.gz": (b"text,label\nfine,good\n", "cannot be read: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(lines(TICKETS * 50).encode())[:-40], "cannot be read: "),
    "one.jsonl": (lines(COMPLETIONS[:1]).encode(), "has 1 rows, 1 of them different"),
    "same-texts.jsonl": (
        lines([{"text": "A", "label": n % 2} for n in range(9)]).encode(),
        "has 9 rows, 1 of them different",
    ),
    "fraction.jsonl": (with_row(TICKETS, 7, label=1.5), 'line 7: "label" is 1.5'),
    "infinite.jsonl": (with_row(TICKETS, 7, label=float("inf")), 'line 7: "label" is Infinity'),
    "null.jsonl": (
        with_line(COMPLETIONS, 7, '{"prompt": "a", "completion": null}'),
        'line 7: field "completion" is null',
    ),
    "ids.jsonl": (lines([{"text": f"t {n}", "label": n} for n in range(1200)]).encode(), "1,200 different labels"),
    "kinds.jsonl": (with_line(COMPLETIONS, 7, json.dumps(CHATS[0])), 'line 7 has no field "prompt"'),
    "share-gpt.jsonl": (
        lines([{"conversations": [{"from": "human", "value": "Hi"}]}]).encode(),
        'has the fields "conversations"; needed are',
    ),
    "from.jsonl": (said(**{"from": "human", "value": "Hi"}), 'line 7, messages 1 has no field "role"'),
    "null-content.jsonl": (with_row(CHATS, 7, messages=[{"role": "user", "content": None}]), "line 7, messages 1: "),
    "number-content.jsonl": (said(role="user", content=3), 'line 7, messages 1: "content" is 3'),
    "nested.jsonl": (said(role="user", content={"text": "a"}), 'line 7, messages 1: "content" is {"text": "a"}'),
    "nested-list.jsonl": (with_row(CHATS, 7, messages=[CHATS[6]["messages"]]), "line 7: messages 1 is ["),
    "text-turn.jsonl": (with_row(CHATS, 7, messages=["Hi", "Ho"]), 'line 7: messages 1 is "Hi"'),
    "no-turns.jsonl": (with_row(CHATS, 7, messages=[]), 'line 7: "messages" is empty'),
    "role-number.jsonl": (said(role=1, content="x"), 'line 7, messages 1: field "role" is 1'),
    "messages.csv": (b'messages\n"[{""role"": ""user""}]"\n', 'line 2: field "messages" is "[{'),
    "one-sided.jsonl": (with_row(PAIRS, 7, rejected=None), 'line 7 has no field "rejected"'),
    "half-text.jsonl": (
        with_row(PAIRS, 7, prompt=None, rejected=[USER]),
        'line 7: of "chosen" and "rejected", one is text',
    ),
}
