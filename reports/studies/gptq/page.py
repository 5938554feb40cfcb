"""Round-to-nearest and GPTQ layer by layer: `python -m reports.studies.gptq.page` writes gptq.md from gptq.json."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.tables.table import Table

BASELINE = "rtn"
HERE = Path(__file__).parent


def render(record: Mapping[str, Any]) -> str:
    """The report as Markdown: the verdict, perplexity, each kind of layer, every layer."""
    layers: dict[str, dict[str, float]] = record["layers"]
    quantizers = [name for name in record["perplexity"] if name != "16-bit"]
    head = [
        f"# {record['model']}: GPTQ and round-to-nearest, layer by layer",
        _verdict(layers, quantizers),
        _setting(record),
    ]
    tables = [_perplexity(record), _kinds(layers, quantizers), _layers(layers, quantizers)]
    return "\n\n".join([*head, *(table.to_markdown() for table in tables)]) + "\n"


def _verdict(layers: Mapping[str, Mapping[str, float]], quantizers: list[str]) -> str:
    parts = []
    for name in quantizers:
        if name != BASELINE:
            ratios = [errors[name] / errors[BASELINE] for errors in layers.values()]
            lower = sum(ratio < 1 for ratio in ratios)
            parts.append(
                f"The error of {name} is below that of round-to-nearest on {lower} of {len(ratios)} layers; "
                f"the ratio is {statistics.median(ratios):.2f} in the median and {max(ratios):.2f} at worst."
            )
    return " ".join(parts)


def _setting(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    commit = f", commit {environment['commit'][:12]}" if environment["commit"] else ""
    grid = "symmetric" if record["symmetric"] else "asymmetric"
    return "\n".join(
        [
            "- error: ||W X - Ŵ X||² / ||W X||², with X what the layer gets in the unquantized model, the same for all",
            f"- {record['n_bits']} bits, {grid}, group size {record['group_size']}, scales in fp16, arithmetic in fp32",
            f"- calibration: {record['calibration_tokens']:,} tokens of {record['text']}, in sequences of "
            f"{record['seq_len']}; measured on {record['held_out_tokens']:,} tokens of other reviews",
            f"- torch {environment['torch']}, transformers {environment['transformers']}, Python "
            f"{environment['python']}, {environment['platform']}{commit}",
            "- made by `make gptq-report`",
        ]
    )


def _perplexity(record: Mapping[str, Any]) -> Table:
    rows = [[name, f"{value:.2f}"] for name, value in record["perplexity"].items()]
    return Table("Perplexity on the held-out text", ["weights", "perplexity"], rows)


def _kinds(layers: Mapping[str, Mapping[str, float]], quantizers: list[str]) -> Table:
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for path, errors in layers.items():
        kinds.setdefault(path.rsplit(".", 1)[-1], []).append(errors)
    rows = [
        [kind, str(len(found)), *(f"{statistics.mean(errors[name] for errors in found):.5f}" for name in quantizers)]
        for kind, found in kinds.items()
    ]
    return Table("Mean error by kind of layer", ["layer", "count", *quantizers], rows)


def _layers(layers: Mapping[str, Mapping[str, float]], quantizers: list[str]) -> Table:
    others = [name for name in quantizers if name != BASELINE]
    rows = [
        [
            path,
            *(f"{errors[name]:.6f}" for name in quantizers),
            *(f"{errors[name] / errors[BASELINE]:.3f}" for name in others),
        ]
        for path, errors in layers.items()
    ]
    return Table("Every layer", ["layer", *quantizers, *(f"{name} / {BASELINE}" for name in others)], rows)


def main() -> int:
    """Write the report again."""
    record = json.loads((HERE / "gptq.json").read_text(encoding="utf-8-sig"))
    (HERE / "gptq.md").write_text(render(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
