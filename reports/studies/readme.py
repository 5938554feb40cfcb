"""The README's tables, made from the committed baselines: `python -m reports.studies.readme` writes it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tabulate import tabulate

from reports.records import BASELINES, find, ratio
from reports.tables.sizes import GIBI

MODELS = ("opt-6.7b", "llama2-7b", "llama3.1-8b", "llama2-13b")
METHODS = ("mezo", "qlora", "qlora-lean", "peqa-lean", "qzo", "qzo-full")
LEAD = ("llama2-7b", "llama2-7b-8x512")  # records of the same model at batch 1 and, of some methods, at batch 8
LEAD_METHODS = ("qlora", "qlora-lean", "peqa-lean", "qzo")


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


def lead(folder: Path) -> str:
    """Markdown: a row a method, allocated and process GiB at two sizes of a step, and both beside those of `qzo`."""
    sizes = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8-sig"))["records"] for name in LEAD]
    headers, rows = ["method"], [[method] for method in LEAD_METHODS]
    for records in sizes:
        qzo = find(records, "qzo")
        assert qzo is not None
        shape = f"batch {qzo['case']['batch_size']}, {qzo['case']['seq_len']} tokens"
        headers += [f"{shape}: allocated", "beside qzo", "process", "beside qzo"]
        for row, method in zip(rows, LEAD_METHODS, strict=True):
            record = find(records, method)
            assert record is not None
            for kind in ("allocated", "process"):
                share = ratio(record, qzo, kind)
                row += [GIBI.show(record["peak"][kind]), f"{share:.2f}x" if share else "n/a"]
    return tabulate(rows, headers, tablefmt="pipe", stralign="right", disable_numparse=True)


def renewed(readme: str, folder: Path) -> str:
    """The README with its tables made again."""
    for name, made in (("baselines", table(folder)), ("lead", lead(folder))):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = readme.split(begin)
        _, after = rest.split(end)
        readme = f"{before}{begin}\n{made}\n\n{end}{after}"
    return readme


def main() -> int:
    """Rewrite README.md in the folder above this package."""
    here = Path(__file__).parents[1]
    readme = here.parent / "README.md"
    readme.write_text(renewed(readme.read_text(encoding="utf-8-sig"), here / "baselines"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
