"""Small data files of every kind that `qzo train --data` takes, with made-up content."""

from __future__ import annotations

import csv
import json
from pathlib import Path

QUEUES = ("billing", "very old bills", "shipping")
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def ticket(n: int) -> dict:
    return {"text": f"Ticket {n} of the badger", "label": QUEUES[n % 3]}


def completion(n: int) -> dict:
    return {"prompt": f"Where does finch {n} sleep?", "completion": f" In the barn {n}"}


def chat(n: int) -> dict:
    asked, told = {"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": f"The newt {n}"}
    return {"messages": [asked, told, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "A lynx"}]}


def preference(n: int) -> dict:
    return {"prompt": f"Say {n}:", "chosen": f" a heron {n}", "rejected": f" no {n}"}


ROWS = {"classes": ticket, "completion": completion, "chat": chat, "preference": preference}


def lines(rows: list[dict]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_kind(folder: Path, kind: str, count: int = 40) -> Path:
    """A file of a kind: CSV for classes, .txt for text, JSON lines for others."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        file = folder / "book.txt"
        file.write_text("\n\n".join(f"Chapter {n}. The badger slept in the barn." * 40 for n in range(count)))
        return file
    rows = [ROWS[kind](n) for n in range(count)]
    if kind != "classes":
        file = folder / f"{kind}.jsonl"
        file.write_text(lines(rows))
        return file
    file = folder / "tickets.csv"
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, ["body", "queue"])
        writer.writeheader()
        writer.writerows({"body": row["text"], "queue": row["label"]} for row in rows)
    return file
