"""Every architecture under every method: `python -m reports.studies.architectures.page` writes architectures.md from
architectures.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.tables.table import Table

HERE = Path(__file__).parent
LONGEST = 160  # of a reason, in characters; the record has it whole


def render(record: Mapping[str, Any]) -> str:
    """The report as Markdown: how many run, then a row a type."""
    head = ["# Every causal language model of transformers, under every method", _verdict(record), _setting(record)]
    return "\n\n".join([*head, _types(record).to_markdown()]) + "\n"


def _verdict(record: Mapping[str, Any]) -> str:
    types: Mapping[str, Any] = record["types"]
    every = len(record["methods"])
    whole = sum(_running(about) == every for about in types.values())
    none = sum(_running(about) == 0 for about in types.values())
    cells = sum(_running(about) for about in types.values())
    return (
        f"Of {len(types)} model types that AutoModelForCausalLM knows, {whole} run all {every} methods, "
        f"{len(types) - whole - none} run some and {none} none: {cells:,} of {every * len(types):,} cells. "
        f"What does not run says why in one line."
    )


def _setting(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    commit = f", commit {environment['commit'][:12]}" if environment["commit"] else ""
    return "\n".join(
        [
            f"- simulated on an {record['gpu']}, {record['batch_size']} sequences of {record['seq_len']} tokens",
            "- each type's default config in transformers, shortened to the first layers that show every kind of layer "
            "and to 16 experts at most",
            f"- torch {environment['torch']}, transformers {environment['transformers']}, Python "
            f"{environment['python']}{commit}",
            "- where a model's own code is named, a step with data on a CPU ends at the same line: tried with xlnet "
            "and xlstm, which in 16 bits runs with a cache alone, and training has none",
            "- made by `make architectures`",
        ]
    )


def _types(record: Mapping[str, Any]) -> Table:
    rows = [
        [name, str(about.get("layers") or "-"), str(_running(about)), _reasons(about)]
        for name, about in record["types"].items()
    ]
    return Table("Types", ["type", "layers", "methods", "what does not run, and why"], rows, text_columns=4)


def _running(about: Mapping[str, Any]) -> int:
    return sum("allocated" in outcome for outcome in about.get("methods", {}).values())


def _reasons(about: Mapping[str, Any]) -> str:
    """Each reason once, after the methods that it stops."""
    if about["config"]:
        return f"all: {_cut(about['config'])}"
    stopped: dict[str, list[str]] = {}
    for method, outcome in about["methods"].items():
        if "allocated" not in outcome:
            stopped.setdefault(outcome["message"], []).append(method)
    every = len(about["methods"])
    named = {reason: "all" if len(methods) == every else ", ".join(methods) for reason, methods in stopped.items()}
    return "; ".join(f"{methods}: {_cut(reason)}" for reason, methods in named.items())


def _cut(reason: str) -> str:
    return reason if len(reason) <= LONGEST else reason[: LONGEST - 3] + "..."


def main() -> int:
    """Write the report again."""
    record = json.loads((HERE / "architectures.json").read_text(encoding="utf-8-sig"))
    (HERE / "architectures.md").write_text(render(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
