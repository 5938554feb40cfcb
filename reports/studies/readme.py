"""The README's table, made from the committed baselines: `python -m reports.studies.readme` writes it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tabulate import tabulate

from reports.records import BASELINES, find, ratio
from reports.tables.sizes import GIBI

MODELS = ("opt-6.7b", "llama2-7b", "llama3.1-8b", "llama2-13b")
METHODS = ("mezo", "qlora", "qlora-lean", "peqa-lean", "qzo", "qzo-full")
BEGIN, END = "<!-- baselines: begin -->\n", "<!-- baselines: end -->"


def table(folder: Path) -> str:
    """Markdown: a row a model and method, allocated and process GiB, and the reduction by allocated bytes."""
    rows = []
    for model in MODELS:
        records = json.loads((folder / f"{model}.json").read_text(encoding="utf-8-sig"))["records"]
        for method in METHODS:
            record = find(records, method)
            if record is None:
                continue
            ratios = [ratio(find(records, name), record, "allocated") for name in BASELINES]
            shown = [f"{value:.1f}x" if value else "n/a" for value in ratios]
            sizes = [GIBI.show(record["peak"][kind]) for kind in ("allocated", "process")]
            rows.append([model, method, *sizes, *shown])
    headers = ["model", "method", "allocated, GiB", "process, GiB", *(f"less than {name}" for name in BASELINES)]
    return tabulate(rows, headers, tablefmt="pipe", stralign="right", disable_numparse=True)


def renewed(readme: str, folder: Path) -> str:
    """The README with its table made again."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(folder)}\n\n{END}{after}"


def main() -> int:
    """Rewrite README.md in the folder above this package."""
    here = Path(__file__).parents[1]
    readme = here.parent / "README.md"
    readme.write_text(renewed(readme.read_text(encoding="utf-8-sig"), here / "baselines"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
