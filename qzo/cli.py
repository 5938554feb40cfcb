"""The command line: `qzo quantize MODEL OUT`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qzo.errors import QzoError

BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json", "*.jinja")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QzoError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 an error, told in one line on stderr."""
    try:
        options = _parser().parse_args(arguments)
        _quantize(options)
    except (QzoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qzo", description="Zeroth-order fine-tuning of quantized language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    quantize = commands.add_parser("quantize", help="write a GPTQ checkpoint, rounded to nearest")
    quantize.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id of an unquantized model")
    quantize.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    quantize.add_argument("--bits", type=int, default=4, choices=(2, 4, 8), help="bits a weight (default 4)")
    quantize.add_argument("--group-size", type=int, default=128, help="weights a scale, -1 a row (default 128)")
    quantize.add_argument("--asymmetric", action="store_true", help="a zero point for each group")
    quantize.add_argument("--format", choices=("gptq", "gptq_v2"), default="gptq", help="file format (default gptq)")
    return parser


def _quantize(options: argparse.Namespace) -> None:
    from qzo.checkpoint import check_target, save
    from qzo.load import load
    from qzo.quantize import quantize
    from qzo.scales import quantized_bytes

    target = Path(options.out)
    check_target(target)
    model = load(options.model)
    quantize(model, options.bits, options.group_size, symmetric=not options.asymmetric)
    save(model, target, options.format)
    _copy_beside(Path(options.model), target)
    for name, size in quantized_bytes(model).items():
        if size:
            print(f"{name:<12}{size:>16,}{'' if name == 'scale_count' else ' bytes'}")


def _copy_beside(source: Path, target: Path) -> None:
    """Copy tokenizer and generation config as they are, where the model came from a folder."""
    for pattern in BESIDE_WEIGHTS if source.is_dir() else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
