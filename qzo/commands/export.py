"""`qzo export RUN OUT`: the tuned tensors of a run, in the checkpoint they came from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from qzo.commands.moved import add_moved
from qzo.errors import printable


def add_command(commands: Any) -> None:
    """Add `export` to the subcommands of a parser."""
    parser = commands.add_parser("export", help="write a tuned model in the checkpoint format it came in")
    parser.add_argument("source", metavar="RUN", help="folder of qzo train, checkpoint of QZOTrainer, or a model")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty; of a .gguf file also NAME.gguf")
    parser.add_argument("--state", choices=("best", "last"), default="best", help="of a run (default best)")
    add_moved(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the model, and tell how many tensors were tuned."""
    from qzo.training.tuned.export import export_model

    done = export_model(Path(options.source), Path(options.out), options.state, options.moved)
    if done.notice is not None:
        print(f"notice: {printable(done.notice)}", file=sys.stderr)
    print(f"{printable(options.out)}: {printable(done.text)}")
