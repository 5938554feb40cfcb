"""The command line `qzo`: its parser, put together from the commands, and its exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from qzo.commands import evaluate as cli_eval
from qzo.commands import inspect as cli_inspect
from qzo.commands.quantize import _quantize
from qzo.commands.replay import _replay
from qzo.commands.train import add_commands
from qzo.errors import QzoError
from qzo.kernels.heap import keep_freed_memory
from qzo.kernels.sizes import BITS

TALKATIVE = ("torchao", "torch.utils._pytree")  # transformers imports torchao, which then tells of kernels it lacks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QzoError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 an error, told in one line on stderr."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    keep_freed_memory()
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
    except (QzoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qzo", description="Zeroth-order fine-tuning of quantized language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    quantize = commands.add_parser("quantize", help="write a checkpoint in the layout of GPTQ")
    quantize.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id of an unquantized model")
    quantize.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    quantize.add_argument("--bits", type=int, default=4, choices=BITS, help="bits a weight (default 4)")
    quantize.add_argument("--group-size", type=int, default=128, help="weights a scale, -1 a row (default 128)")
    quantize.add_argument("--asymmetric", action="store_true", help="a zero point for each group")
    quantize.add_argument("--format", choices=("gptq", "gptq_v2"), default="gptq", help="file format (default gptq)")
    quantize.add_argument(
        "--method", choices=("rtn", "gptq"), default="rtn", help="round to nearest (default), or GPTQ"
    )
    quantize.add_argument("--calibration", metavar="TEXT", help="gptq: text file, or rotten-tomatoes (default)")
    quantize.add_argument("--samples", type=int, default=128, help="gptq: sequences of calibration text (default 128)")
    quantize.add_argument("--seq-len", type=int, default=256, help="gptq: tokens a sequence (default 256)")
    quantize.add_argument("--act-order", action="store_true", help="gptq: columns by falling weight of their inputs")
    quantize.add_argument("--static-groups", action="store_true", help="gptq: with --act-order, keep groups in place")
    quantize.set_defaults(run=_quantize)
    replay = commands.add_parser("replay", help="rebuild a tuned model from its journal, without data")
    replay.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id of the checkpoint that was tuned")
    replay.add_argument("journal", metavar="JOURNAL", help="file that qzo.Journal wrote")
    replay.add_argument("out", metavar="OUT", nargs="?", help="folder to write, new or empty; without, only check")
    replay.add_argument("--no-snapshot", action="store_true", help="replay every step from the first")
    replay.set_defaults(run=_replay)
    cli_eval.add_command(commands)
    cli_inspect.add_command(commands)
    add_commands(commands)
    return parser
