"""Every quantization format on one model: `python -m reports.studies.formats.page` writes page and README's table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.studies.words import machine
from reports.tables.table import Table

HERE = Path(__file__).parent
RECORD, REPORT = "formats.json", "formats.md"
BEGIN, END = "<!-- formats: begin -->\n", "<!-- formats: end -->"
MEBI = 1 << 20
Entry = Mapping[str, Any]


def render(record: Mapping[str, Any]) -> str:
    """The report as Markdown, of a record of `bench.studies.formats`."""
    lost = [entry for entry in record["entries"] if "missing" in entry]
    parts = [
        f"# {record['model']} on {record['task']}: every quantization format",
        setting(record),
        table(record).to_markdown(),
        *(_read_back(entry) for entry in _measured(record) if "read back" in entry),
    ]
    if lost:
        parts.append("\n".join(f"- not run: {entry['format']}, {entry['missing']}" for entry in lost))
    return "\n\n".join(parts) + "\n"


def setting(record: Mapping[str, Any]) -> str:
    """Where all formats start, how they were trained, and on what machine."""
    about = record["settings"]
    machines = {machine(entry["environment"]) for entry in _measured(record)}
    lines = [
        "Start: the weights of the model's GGUF, dequantized and quantized to the format layer by layer, embedding and "
        'head apart; the line "gguf file" is the file itself, packed, its vocabulary in Q8_0.',
        f"QZO: {about['steps']} steps of {about['directions']} one-sided directions on batches of "
        f"{about['batch_size']}, the scales of layers {about['first_layer']} to {about['last_layer']} (what lies below "
        f"is computed once a step), relative amounts, lr {about['lr']:g}, eps {about['eps']:g}, clip threshold "
        f"{about['clip_threshold']:g}, fp32 arithmetic, seed {about['seed']}; the same for all, found for GPTQ.",
        f"Accuracy on {about['examples']} test examples: {_uncertainty(about['examples'])} points of standard error "
        "each.",
        *(
            f"Machine: {machine}; `python -m bench.studies.formats --out reports/studies/formats/formats.json`."
            for machine in sorted(machines)
        ),
    ]
    return "\n".join(f"- {line}" for line in lines)


def table(record: Mapping[str, Any]) -> Table:
    """One line a format: what it takes, and what it learns."""
    headers = ["format", "bytes a weight", "scales", "s a step", "peak, MiB", "accuracy before, %", "after, %"]
    notes = [
        "bytes a weight: codes, scales, zero points, offsets, and tables of all quantized layers, by their weights; a "
        "codebook weighs more in a model of this size than in a large one; nf4-double is un-nested for training",
        "scales: of the whole model. s a step: median, longer on a busy machine, so to be compared within the table; "
        "peak: allocated bytes of a step, fp32 parts of the model and the fp32 master of each trained scale included",
        "2 bits and less, rounded to the nearest or to small codebooks, leave little of a model of this size; "
        "aqlm-1x16 is left out, for nothing here finds its codes",
    ]
    return Table("Formats", headers, [_row(entry) for entry in _measured(record)], notes)


def _row(entry: Entry) -> list[str]:
    return [
        entry["format"],
        f"{entry['quantized_bytes'] / entry['weights']:.3f}",
        f"{entry['scales']:,}",
        f"{entry['step_seconds']:.2f}",
        f"{entry['peak_allocated_bytes'] / MEBI:.1f}",
        *(f"{100 * entry[when]['accuracy']:.1f}" for when in ("before", "after")),
    ]


def _read_back(entry: Entry) -> str:
    """What the trained file says of itself to another reader."""
    trained, found = (entry[when] for when in ("after", "read back"))
    return (
        f"- {entry['format']}, written with the trained scales and read by transformers, which dequantizes it: "
        f"{100 * found['accuracy']:.1f} % with loss {found['loss']:.4f}; packed, as it was trained: "
        f"{100 * trained['accuracy']:.1f} % with loss {trained['loss']:.4f}"
    )


def renewed(readme: str, record: Mapping[str, Any]) -> str:
    """The README with its table of formats made again."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    grid = "\n".join(line for line in table(record).to_markdown().splitlines() if line.startswith("|"))
    return f"{before}{BEGIN}\n{grid}\n\n{END}{after}"


def _measured(record: Mapping[str, Any]) -> list[Entry]:
    return [entry for entry in record["entries"] if "missing" not in entry]


def _uncertainty(count: int) -> str:
    """Standard error at 75 %, in points."""
    return f"about {100 * (0.75 * 0.25 / count) ** 0.5:.1f}"


def main() -> int:
    """Write the report beside the record, and the table into README.md where it has the markers."""
    record = json.loads((HERE / RECORD).read_text(encoding="utf-8-sig"))
    (HERE / REPORT).write_text(render(record), encoding="utf-8")
    readme = HERE.parents[2] / "README.md"
    text = readme.read_text(encoding="utf-8-sig")
    if BEGIN in text:
        readme.write_text(renewed(text, record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
