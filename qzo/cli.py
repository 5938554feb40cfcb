"""The command line: `qzo quantize` and `qzo replay`; `qzo.cli_eval`, `cli_inspect` and `training_cli` have the rest."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qzo import cli_eval, cli_inspect
from qzo.errors import QzoError
from qzo.heap import keep_freed_memory
from qzo.layout import BITS
from qzo.training_cli import add_commands

if TYPE_CHECKING:
    from torch import Tensor

BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json", "*.jinja")
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


def _quantize(options: argparse.Namespace) -> None:
    from qzo.checkpoint import check_target, save
    from qzo.load import load
    from qzo.quantize import quantize
    from qzo.scales import quantized_bytes

    target = Path(options.out)
    check_target(target)
    calibration = _calibration(options)  # before the model: a text that cannot be read costs no time
    model = load(options.model)
    quantize(
        model,
        options.bits,
        options.group_size,
        symmetric=not options.asymmetric,
        method=options.method,
        calibration=calibration,
        act_order=options.act_order,
        static_groups=options.static_groups,
    )
    save(model, target, options.format)
    _copy_beside(Path(options.model), target)
    for name, size in quantized_bytes(model).items():
        if size:
            print(f"{name:<12}{size:>16,}{'' if name == 'scale_count' else ' bytes'}")


def _calibration(options: argparse.Namespace) -> list[Tensor] | None:
    """Batches of calibration text for GPTQ; progress then goes to stderr."""
    if options.method != "gptq":
        if options.calibration is not None:
            raise QzoError("--calibration needs --method gptq")
        return None
    from qzo.calibration import REVIEWS, calibration_text, token_batches
    from qzo.load import load_tokenizer

    logging.basicConfig(format="%(message)s")
    logging.getLogger("qzo").setLevel(logging.INFO)
    text = calibration_text(options.calibration or REVIEWS)
    tokenizer = load_tokenizer(options.model)
    tokenizer.model_max_length = sys.maxsize  # the text is cut afterwards, so its length is no news
    return token_batches(
        lambda string: tokenizer.encode(string, add_special_tokens=False), text, options.samples, options.seq_len
    )


def _replay(options: argparse.Namespace) -> None:
    import torch

    from qzo.checkpoint import check_target, format_of, save
    from qzo.export import in_own_layout, write_tuned
    from qzo.journal_lines import read
    from qzo.load import load
    from qzo.replay import replay
    from qzo.training_learners import live_tensors

    journal = Path(options.journal)
    header = read(journal).header
    if options.out and header["optimizer"] != "QZO":
        raise QzoError(f"{journal} is of {header['optimizer']}; only a quantized model can be written, leave OUT away")
    if options.out:
        check_target(Path(options.out))
    packed = header["optimizer"] == "QZO"  # a .gguf file's blocks, where its scales were tuned
    model = load(options.model, getattr(torch, header["dtype"]), header["device"], dequantize=not packed)
    optimizer, notices = replay(model, journal, snapshot=not options.no_snapshot)
    for notice in notices:
        print(f"notice: {notice}", file=sys.stderr)
    if options.out:
        source, out = Path(options.model), Path(options.out)
        if in_own_layout(options.model):
            write_tuned(options.model, live_tensors(optimizer), out)
        else:
            save(model, out, format_of(source))
            _copy_beside(source, out)
    print(f"steps       {optimizer.steps:>16,}\nskipped     {optimizer.skipped_steps:>16,}")


def _copy_beside(source: Path, target: Path) -> None:
    """Copy tokenizer and generation config as they are, or, where the model is no folder, write the tokenizer alone."""
    for pattern in BESIDE_WEIGHTS if source.is_dir() else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if not source.is_dir():
        from qzo.load import load_tokenizer

        try:
            load_tokenizer(source).save_pretrained(target)
        except QzoError as error:
            print(f"note: {error}; {target} is written without one", file=sys.stderr)
