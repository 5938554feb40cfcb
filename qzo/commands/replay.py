"""`qzo replay MODEL JOURNAL [OUT]`: a tuned model rebuilt from its journal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from qzo.commands.moved import add_moved, check_moved
from qzo.errors import QzoError, printable


def add_command(commands: Any) -> None:
    """Add `replay` to the subcommands of a parser."""
    parser = commands.add_parser("replay", help="rebuild a tuned model from its journal, without data")
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id of what was tuned; or a run")
    parser.add_argument("journal", metavar="JOURNAL", help="file that qzo.Journal wrote")
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to write, new or empty; without, only check")
    add_moved(parser)
    parser.add_argument("--no-snapshot", action="store_true", help="replay every step from the first")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Replay, write the model where OUT is given, and print the steps."""
    import torch

    from qzo.checkpoints.save import save
    from qzo.durable import check_target
    from qzo.journal.header import check_header, device_of
    from qzo.journal.lines import read
    from qzo.journal.replay import replay
    from qzo.training.tuned.models import load
    from qzo.training.tuned.state import is_tuned

    check_moved(options.moved, Path(options.model), is_tuned(Path(options.model)))
    journal = Path(options.journal)
    header = read(journal).header
    check_header(journal, header)
    device = device_of(journal, header)
    if options.out and header["optimizer"] != "QZO":
        raise QzoError(f"{journal} is of {header['optimizer']}; only a quantized model can be written: leave OUT away")
    if options.out:
        check_target(Path(options.out))
    packed = header["optimizer"] == "QZO"  # a .gguf file's blocks, where its scales were tuned
    model = load(options.model, getattr(torch, header["dtype"]), device, dequantize=not packed, model=options.moved)
    optimizer, notices = replay(model, journal, snapshot=not options.no_snapshot)
    for notice in notices:
        print(f"notice: {printable(notice)}", file=sys.stderr)
    if options.out:
        save(model, options.out)
    print(f"steps       {optimizer.steps:>16,}\nskipped     {optimizer.skipped_steps:>16,}")
