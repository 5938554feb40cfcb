"""Data that cannot be trained on where more than one file says so: what a user would do, and what must be said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damaged_data import CHATS, COMPLETIONS, DAMAGED, PAIRS, TICKETS, USER, with_row
from own_files import lines

Fault = tuple[str, Callable[[Path], None], list[str], str]  # model, what makes the files, options, what must be said


def write(**files: bytes | str) -> Callable[[Path], None]:
    """What writes files; the first two underscores of a name are its dot."""

    def made(folder: Path) -> None:
        for name, content in files.items():
            file = folder / name.replace("__", ".")
            file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return made


def node(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """What puts something that is no file in the place of rows.jsonl."""
    return lambda folder: make(folder / "rows.jsonl") and None


def parquet(rows: list[dict], cut: int | None = None) -> Callable[[Path], None]:
    """What writes a parquet file, or its first bytes."""

    def made(folder: Path) -> None:
        import pyarrow
        from pyarrow import parquet as writer

        writer.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
        data = (folder / "rows.parquet").read_bytes()
        (folder / "rows.parquet").write_bytes(data[:cut])

    return made


def faults() -> dict[str, Fault]:
    """Name -> a fault that needs more than one file."""
    tickets, chats, completions = (lines(rows) for rows in (TICKETS, CHATS * 2, COMPLETIONS * 2))
    unseen = lines([{**TICKETS[0], "label": "unseen"}])
    ROWS, OTHER, WORDS = ["--data", "rows.jsonl"], ["--validation", "other.jsonl"], ["--label-words", "words"]
    table: dict[str, Fault] = {
        "no such file": ("chat", write(), ROWS, "rows.jsonl cannot be read: No such file"),
        "no such folder": ("chat", write(), ["--data", "a/b/"], "a/b"),
        "an empty folder": ("chat", node(Path.mkdir), ROWS, "rows.jsonl has no data file"),
        "a folder of other files": ("chat", write(a__docx="x"), ["--data", "."], "has no data file"),
        "a folder of two kinds": (
            "chat",
            write(a__jsonl=tickets, b__jsonl=completions),
            ["--data", "."],
            'b.jsonl, line 1 has no field "label"',
        ),
        "a FIFO": ("chat", node(os.mkfifo), ROWS, "rows.jsonl"),
        "a link to nothing": ("chat", node(lambda path: path.symlink_to("gone")), ROWS, "rows.jsonl"),
        "a link to itself": ("chat", node(lambda path: path.symlink_to(path)), ROWS, "rows.jsonl"),
        "/dev/zero": ("chat", node(lambda path: path.symlink_to("/dev/zero")), ROWS, "rows.jsonl"),
        "a file that may not be read": ("chat", write(rows__jsonl=tickets), ROWS, ""),
        "no ending": ("chat", write(rows=tickets), ["--data", "rows"], "rows is no data file; known are"),
        "a spreadsheet": ("chat", write(rows__xlsx=b"PK\3\4"), ["--data", "rows.xlsx"], "rows.xlsx is no data file"),
        "a zip called CSV": ("chat", write(rows__csv=b"PK\3\4\x14\0"), ["--data", "rows.csv"], "rows.csv, line 1"),
        "unseen in validation": (
            "chat",
            write(rows__jsonl=tickets, other__jsonl=unseen),
            [*ROWS, *OTHER],
            'other.jsonl, line 1: no training row has the label "unseen"',
        ),
        "validation of another kind": (
            "chat",
            write(rows__jsonl=tickets, other__jsonl=chats),
            [*ROWS, *OTHER],
            'other.jsonl, line 1 has no field "text"',
        ),
        "validation that is damaged": (
            "chat",
            write(rows__jsonl=tickets, other__jsonl=with_row(TICKETS, 7, label=None)),
            [*ROWS, *OTHER],
            'other.jsonl, line 7 has no field "label"',
        ),
        "validation that is empty": (
            "chat",
            write(rows__jsonl=tickets, other__jsonl=""),
            [*ROWS, *OTHER],
            "other.jsonl is empty",
        ),
        "validation is training": (
            "chat",
            write(rows__jsonl=tickets),
            [*ROWS, "--validation", "rows.jsonl"],
            "also stand in another split",
        ),
        "no such column": (
            "chat",
            write(rows__jsonl=tickets),
            [*ROWS, "--columns", "text=body"],
            'rows.jsonl, line 1 has no column "body"',
        ),
        "a column in some rows": (
            "chat",
            write(rows__jsonl=with_row(TICKETS, 7, label=None)),
            [*ROWS, "--columns", "label=label"],
            'rows.jsonl, line 7 has no column "label"',
        ),
        "one column twice": ("chat", write(rows__jsonl=tickets), [*ROWS, "--columns", "text=text,label=text"], "text"),
        "two columns for a field": (
            "chat",
            write(rows__jsonl=tickets),
            [*ROWS, "--columns", "text=text,text=label"],
            "--columns",
        ),
        "no words file": ("chat", write(rows__jsonl=tickets), [*ROWS, *WORDS], "words cannot be read"),
        "words that lack a label": (
            "chat",
            write(rows__jsonl=tickets, words="billing\ta\n"),
            [*ROWS, *WORDS],
            "words has no words for the label",
        ),
        "words without a tab": (
            "chat",
            write(rows__jsonl=tickets, words="billing a\n"),
            [*ROWS, *WORDS],
            "words, line 1 is",
        ),
        "words that are a list": ("chat", write(rows__jsonl=tickets, words="[1]"), [*ROWS, *WORDS], "words, line 1"),
        "words in another encoding": (
            "chat",
            write(rows__jsonl=tickets, words=b"billing\tcaf\xe9\n"),
            [*ROWS, *WORDS],
            "words, line 1 is not UTF-8",
        ),
        "words of numbers": (
            "chat",
            write(rows__jsonl=tickets, words='{"billing": 1}'),
            [*ROWS, *WORDS],
            "words must give text",
        ),
        "no template": ("plain", write(rows__jsonl=chats), ROWS, "has no chat template"),
        "a template that raises": (
            "raises",
            write(rows__jsonl=chats),
            ROWS,
            "the chat template refuses these messages: roles must alternate",
        ),
        "a template that is no template": ("syntax", write(rows__jsonl=chats), ROWS, "the chat template refuses"),
        "a template with what is not there": ("undefined", write(rows__jsonl=chats), ROWS, "the chat template refuses"),
        "a template that rewrites": ("rewrites", write(rows__jsonl=chats), ROWS, "writes earlier turns in another way"),
        "a template that writes nothing": ("silent", write(rows__jsonl=chats), ROWS, "has no chat template"),
        "too short rows": ("chat", write(rows__jsonl=chats), [*ROWS, "--max-length", "3"], "leaves nothing to learn"),
        "a test that is damaged": (
            "chat",
            write(rows__jsonl=tickets, t__csv="text,label\na,b,c\n"),
            [*ROWS, "--test", "t.csv"],
            "t.csv, line 2 has 3 values under a header of 2",
        ),
        "too few rows": (
            "chat",
            write(rows__jsonl=lines(PAIRS[:2])),
            ROWS,
            "rows.jsonl has 2 rows, 2 of them different",
        ),
        "no prompt for a reward": (
            "chat",
            write(rows__jsonl=tickets, f__py="def f(completions): return [0.0]"),
            [*ROWS, "--reward", "f.py:f"],
            "rows.jsonl, line 1 has the fields text, label",
        ),
        "an answer in a prompt": (
            "chat",
            write(rows__jsonl=lines([{"prompt": CHATS[0]["messages"]}] * 9), f__py="def f(completions): return [0.0]"),
            [*ROWS, "--reward", "f.py:f"],
            "rows.jsonl, line 1: the last message of the prompt is the assistant's",
        ),
        "parquet of other columns": (
            "chat",
            parquet([{"a": "b"}]),
            ["--data", "rows.parquet"],
            'rows.parquet, row 1 has the fields "a"',
        ),
        "parquet without a label": (
            "chat",
            parquet([*TICKETS[:6], {"text": "a"}]),
            ["--data", "rows.parquet"],
            'rows.parquet, row 7: "label" is null',
        ),
        "parquet cut off": ("chat", parquet(TICKETS, 90), ["--data", "rows.parquet"], "rows.parquet cannot be read"),
        "parquet with messages of no content": (
            "chat",
            parquet([{"messages": [USER]}, {"messages": [{"role": "assistant"}]}]),
            ["--data", "rows.parquet"],
            "rows.parquet, row 1",
        ),
    }
    if os.geteuid() == 0:  # who may read all
        del table["a file that may not be read"]
    one = {
        name: ("chat", write(**{name: content}), ["--data", name], message)
        for name, (content, message) in DAMAGED.items()
    }
    return {**one, **table}
