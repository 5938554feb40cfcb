"""The command line `qzo`: its parser, put together from the commands, and its exit codes."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import qzo
from qzo import __version__
from qzo.commands import evaluate, export, generate, inspect, quantize, replay, report, train
from qzo.commands.streams import tolerant_streams
from qzo.errors import QzoError, printable
from qzo.kernels.heap import keep_freed_memory
from qzo.signals import Stopped, interruptible, number_of

COMMANDS = (quantize, replay, evaluate, generate, inspect, train, report, export)  # in the order of `qzo --help`


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QzoError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 an error, told in one line on stderr, 130 Ctrl-C, 143 SIGTERM."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an ASCII terminal is shown escapes where it has no character
            stream.reconfigure(errors="backslashreplace")
    try:
        with interruptible(), tolerant_streams(), _own_warnings_as_notices():
            options = _parser().parse_args(arguments)
            options.run(options)
    except Stopped as error:
        return _told(error, 128 + error.number)
    except (QzoError, OSError) as error:
        return _told(error, 2)
    except KeyboardInterrupt as error:
        return _told("interrupted; nothing is left half written", 128 + number_of(error))
    return 0


@contextmanager
def _own_warnings_as_notices() -> Iterator[None]:
    """Within, what qzo warns of is a line for a user of the command, without the place in its source."""
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> str:
        is_own = Path(filename).is_relative_to(Path(qzo.__file__).parent)
        return f"notice: {printable(message)}\n" if is_own else usual(message, category, filename, *rest)

    warnings.formatwarning = formatted  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _told(error: object, code: int) -> int:
    with suppress(OSError):  # nobody listens
        if sys.stderr is not None:  # closed before the start
            print(f"error: {printable(error)}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qzo", description="Zeroth-order fine-tuning of quantized language models.")
    parser.add_argument("--version", action="version", version=f"qzo {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser
