"""`qzo inspect MODEL`: what a checkpoint holds and whether it can be trained, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzo.commands.moved import add_moved, check_moved
from qzo.errors import NotFinite, printable
from qzo.output import check_output, write_output

if TYPE_CHECKING:
    from qzo.models.inspection import Inspection

CALLED = {"zero_points": "zero points", "g_idx": "group indices"}


def add_command(commands: Any) -> None:
    """Add `inspect` to the subcommands of a parser."""
    parser = commands.add_parser("inspect", help="what a checkpoint holds and whether its scales can be trained")
    parser.add_argument("model", metavar="MODEL", help="folder or .gguf file, of which no codes are read; or a run")
    add_moved(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Inspect, print the table, write the JSON file. Raises NotFinite, after that, for numbers that are none."""
    from qzo.checkpoints.inspect import inspect
    from qzo.training.tuned.state import is_tuned, read_tuned

    if options.json:
        check_output(options.json)
    source = Path(options.model)
    check_moved(options.moved, source, is_tuned(source))
    tuned = read_tuned(source, model=options.moved) if is_tuned(source) else None
    found = inspect(tuned.model if tuned else options.model)
    about = {}
    if tuned is not None:
        about = {"run": {"folder": options.model, "method": tuned.settings["method"], "step": tuned.step}}
        after = "" if tuned.step is None else f", best after {tuned.step} steps"
        print(f"{'run':<22}{printable(options.model)}: {tuned.settings['method']}{after}")
    print(table(found))
    if options.json:
        write_output(options.json, json.dumps({**found.to_json(), **about}, indent=2) + "\n")
    if not found.finite:
        raise NotFinite(f"{found.model}: {found.reason}")


def table(found: Inspection) -> str:
    """The lines for people, each safe to print whatever the checkpoint calls its parts."""
    lines = [("model", found.model), ("format", f"{found.format}{f', {found.version}' if found.version else ''}")]
    if found.layers:
        lines.append(("quantized layers", f"{found.layers:,}"))
    for name, value in (("bits", found.n_bits), ("group size", found.group_size)):
        if value is not None:
            lines.append((name, f"{value}"))
    if not found.trainable:  # of a foreign format, all that is known
        lines += [(f"  {name}", json.dumps(value)) for name, value in found.settings.items()]
    for part, size in found.sizes.items():
        if size:
            lines.append((CALLED.get(part, part), f"{found.counts[part]:>16,} numbers {size:>18,} bytes"))
    lines.append(("trains with QZO", "yes" if found.reason is None else f"no: {found.reason}"))
    for name, count in found.trainable.items() if found.reason is None else ():
        note = f" ({found.moving})" if name == "scales+offsets" else ""
        lines.append((f"  {name}", f"{count:>16,} numbers{note}"))
    return "\n".join(printable(f"{name:<22}{value}") for name, value in lines)
