"""A user's own data, from a file to a model that llama.cpp runs, by one command each and no number given by hand.

`python -m bench.studies.own_data --out FILE` takes five kinds of data one after the other: makes a small file, trains
SmolLM2's GGUF with `qzo train MODEL --data FILE --out RUN`, kills that after half of the steps and goes on with it,
exports the best state, scores it on the validation rows beside the untuned model, and compares greedy answers with
llama.cpp's. Stopped at any moment, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases.weights import gguf_source
from bench.commands.parser import Parser
from bench.records.environment import environment
from bench.studies.own_data.answers import compared
from bench.studies.own_data.command import trained
from bench.studies.own_data.rows import KINDS, ROWS, asked, write
from qzo import tasks
from qzo.checkpoints.load import load, load_tokenizer
from qzo.durable import replace_file
from qzo.errors import QzoError
from qzo.training.run import FOUND, RESULT, dtype_of, read_run
from qzo.training.tuned.export import export_model

MODEL = "smollm2-135m"
NODE = Path(".venv-llamacpp")
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that --out lacks, and write them there; 0, or 2 and one line on stderr."""
    parser = Parser(
        prog="python -m bench.studies.own_data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the kinds that it holds are not run again")
    parser.add_argument("--work", type=Path, default=Path("results/own-data"), help="folder of files and runs")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--node", type=Path, default=NODE, help="folder with node-llama-cpp, see make test-llamacpp")
    parser.add_argument("--steps", type=int, help="of a trial of this study; default: as many as the command takes")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        kinds = options.kinds.split(",")
        if unknown := set(kinds) - set(KINDS):
            raise QzoError(f"--kinds {min(unknown)} is not known; choose {', '.join(KINDS)}")
        for kind in kinds:
            if kind not in read(options.out):
                log.info("%s", kind)
                add(options.out, kind, measure(kind, options.work, options.node, options.steps))
    except (QzoError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def measure(kind: str, work: Path, node: Path, steps: int | None = None) -> dict[str, Any]:
    """The entry of a kind. Raises QzoError where something of the way does not end as it should."""
    source = str(gguf_source(MODEL).weights)
    data, run, file = write(kind, work), work / kind, work / f"{kind}.gguf"
    spent = trained(source, data, run, ["--steps", str(steps)] if steps else [])
    about = read_run(run)
    result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    if not file.exists():
        export_model(run, file)
    dtype = dtype_of(about["settings"])
    before, after = (scores(place, data, about, dtype) for place in (source, str(file)))
    for name, ours, theirs in (("first", before, result["first"]), ("best", after, result["best"])):
        if ours["loss"] != theirs["loss"]:
            raise QzoError(f"{run}: {name} validation loss {theirs['loss']}, and scored anew {ours['loss']}")
    log.info("%s: loss %.4f -> %.4f", kind, before["loss"], after["loss"])
    return {
        "data": data.name,
        "settings": {**about["settings"], **about[FOUND]},
        "before": before,
        "after": after,
        "best_step": result["best_step"],
        "steps": result["steps"],
        "trial": steps is not None,
        "forwards": result["steps"] * evaluations(about["settings"]),
        **vars(spent),
        "answers": compared(node, file, asked(kind)),
        "environment": {
            **environment(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def evaluations(settings: dict[str, Any]) -> int:
    """Forward passes of a step."""
    count = int(settings["directions"])
    return {"one-sided": count + 1, "population": count, "two-sided": 2 * count}[settings["estimator"]]


def scores(place: str, data: Path, about: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Of a model on the validation rows that a run's settings draw, as the run scores them."""
    settings = about["settings"]
    task = tasks.from_data(str(data))
    objective: Any = tasks.objective(task, load_tokenizer(place), settings["max_length"])
    model: Any = load(place, dtype, dequantize=False).eval()
    objective.fitted(settings["max_length"] or model.config.max_position_embeddings)
    rows = objective.rows(task.splits(seed=settings["seed"])["validation"])
    return {**objective.evaluate(model, rows, settings["eval_batch_size"])}


def add(file: Path, kind: str, entry: dict[str, Any]) -> None:
    """Put the entry of a kind into the record."""
    entries = {**read(file), kind: entry}
    content = {"model": MODEL, "rows": ROWS, "entries": {kind: entries[kind] for kind in KINDS if kind in entries}}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def read(file: Path) -> dict[str, Any]:
    """The entries of a record by kind; none where there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8-sig"))["entries"]) if file.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
