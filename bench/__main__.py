"""Command line of the bench: `python -m bench run | fit | list | compare | validate`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from bench.commands.parser import Parser, add_options
from qzo.errors import QzoError

OK, FAILED, ERROR, INTERRUPTED = 0, 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = Parser(prog="python -m bench", description="Where the memory of fine-tuning goes.")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="run | fit | list | compare | validate", parser_class=Parser
    )
    run = commands.add_parser("run", help="measure or simulate the methods on one model and print the tables")
    run.add_argument("model", nargs="?", help="name from `list models`, folder with config.json, .gguf file, or hub id")
    run.add_argument("--methods", help="comma-separated; default all (`list methods`)")
    run.add_argument("--device", default="auto", help="auto, cuda, cpu or sim")
    run.add_argument("--gpu", help="what sim stands for: a GPU (`list gpus`) or cpu")
    run.add_argument("--batch-size", type=int, help="default 1")
    run.add_argument("--seq-len", type=int, help="tokens of a row; default 128")
    run.add_argument("--attention", help="flash, efficient, cudnn, math or eager; default the best the device has")
    run.add_argument("--gradient-checkpointing", action="store_true")
    run.add_argument("--group-size", type=int, help="weights a scale in qzo and qzo-full; default 128 where it divides")
    run.add_argument("--quantization", help="format of qzo and qzo-full (`list quantizations`); default gptq, 4 bits")
    run.add_argument("--steps", type=int, default=5, help="optimizer steps of a measured cell, at least 3")
    add_options(run)
    run.add_argument("--out", help="result folder; default results/MODEL")
    fit = commands.add_parser("fit", help="the largest batch and the longest sequence that a memory holds")
    fit.add_argument("model", nargs="?", help="as for `run`")
    fit.add_argument("--memory", help="24GiB, 24GB, 24576MiB, or a number of GiB; default the memory of --gpu")
    fit.add_argument("--methods", help="comma-separated; default all (`list methods`)")
    fit.add_argument("--gpu", help="GPU whose kernels and context count (`list gpus`)")
    fit.add_argument("--seq-len", type=int, help="tokens for which the largest batch is wanted; default 512")
    fit.add_argument("--attention", help="flash, efficient, cudnn, math or eager; default the best the device has")
    fit.add_argument("--gradient-checkpointing", action="store_true")
    add_options(fit)
    fit.add_argument("--json", help="write the answer to this file")
    show = commands.add_parser("list", help="print the known names")
    show.add_argument("what", choices=("models", "methods", "gpus", "quantizations"))
    compare = commands.add_parser("compare", help="exit 1 if memory grew more than allowed")
    compare.add_argument("baseline")
    compare.add_argument("current")
    compare.add_argument("--fail", action="append", metavar="METRIC:LIMIT", help="e.g. allocated:1%% (the default)")
    validate = commands.add_parser("validate", help="predict measurements made on a GPU and compare")
    validate.add_argument("measurements", help="file with one JSON object a line (bench/validation/measurement.py)")
    add_options(validate, recipe="of rows that state none: configuration of TRL, the Trainer, axolotl, LLaMA-Factory")
    validate.add_argument("--json", help="write statistics and rows to this file")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    before = signal.signal(signal.SIGTERM, _interrupt)  # a CI's time-out must end the workers too
    try:
        options = parser().parse_args(arguments)
        if options.command == "compare":
            from bench.commands.compare import run as compare

            return compare(options.baseline, options.current, options.fail or [])
        if options.command == "validate":
            from bench.commands.validate import run as validate

            return validate(options)
        if options.command == "fit":
            from bench.commands.fit import run as fit

            return fit(options)
        if options.command == "list":
            from bench.commands.listing import print_names

            return print_names(options.what)
        from bench.commands.run import run

        return run(options)
    except QzoError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("interrupted; the finished cells are on disk", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
