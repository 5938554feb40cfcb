"""`--model`: where the model of a run lies now, if it moved. Every command that takes a run has it, by this name."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from qzo.errors import QzoError


def add_moved(parser: ArgumentParser) -> None:
    """Add the option, also under the name that some commands had for it; its value is `moved`."""
    said = "of a run: where its model lies now, if that moved"
    parser.add_argument("--model", "--base", dest="moved", metavar="MODEL", help=said)


def check_moved(moved: str | None, source: Path, is_run: bool) -> None:
    """Raise QzoError for the option beside what is no run."""
    if moved is not None and not is_run:
        raise QzoError(f"--model is for a run whose model moved, and {source} is none; leave it out")
