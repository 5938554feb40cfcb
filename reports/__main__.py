"""`python -m reports DIR [--format md,csv,html,png]`: exit 0, or 2 and one line on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import reports
from reports.errors import ReportError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ReportError(f"{message}; see python -m reports --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of a results folder and write the files asked for into it."""
    parser = _Parser(prog="python -m reports", description="Tables, figure and page of a results folder.")
    parser.add_argument("folder", metavar="DIR", help="folder with <method>.json records, as `bench run` writes it")
    parser.add_argument(
        "--format",
        default=",".join(reports.DEFAULT_FORMATS),
        help=f"comma-separated: {', '.join(reports.FORMATS)} (default: %(default)s)",
    )
    try:
        options = parser.parse_args(argv)
        written = reports.write(options.folder, options.format.split(","))
        text = reports.tables(options.folder)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; the interpreter must not complain when it flushes again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
