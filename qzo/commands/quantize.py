"""`qzo quantize MODEL OUT`: a checkpoint in the layout of GPTQ."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzo.commands.moved import add_moved, check_moved
from qzo.errors import QzoError
from qzo.kernels.rounding.sizes import BITS

if TYPE_CHECKING:
    from torch import Tensor

    from qzo.training.tuned.state import Tuned


def add_command(commands: Any) -> None:
    """Add `quantize` to the subcommands of a parser."""
    parser = commands.add_parser("quantize", help="write a checkpoint in the layout of GPTQ")
    parser.add_argument(
        "model", metavar="MODEL", help="folder, .gguf file or hub id of an unquantized model; or a run on one"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    add_moved(parser)
    parser.add_argument("--bits", type=int, default=4, choices=BITS, help="bits a weight (default 4)")
    parser.add_argument("--group-size", type=int, default=128, help="weights a scale, -1 a row (default 128)")
    parser.add_argument("--asymmetric", action="store_true", help="a zero point for each group")
    parser.add_argument("--format", choices=("gptq", "gptq_v2"), default="gptq", help="file format (default gptq)")
    parser.add_argument("--method", choices=("rtn", "gptq"), default="rtn", help="round to nearest (default), or GPTQ")
    parser.add_argument("--calibration", metavar="TEXT", help="gptq: text file, or rotten-tomatoes (default)")
    parser.add_argument("--samples", type=int, default=128, help="gptq: sequences of calibration text (default 128)")
    parser.add_argument("--seq-len", type=int, default=256, help="gptq: tokens a sequence (default 256)")
    parser.add_argument("--act-order", action="store_true", help="gptq: columns by falling weight of their inputs")
    parser.add_argument("--static-groups", action="store_true", help="gptq: with --act-order, keep groups in place")
    names = "names of modules, such as mlp.gate or layers.0"
    parser.add_argument("--skip", nargs="+", metavar="NAME", help=f"leave in 16 bits: {names}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="leave all else in 16 bits")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Quantize, write the checkpoint, and print the bytes of its parts."""
    from qzo.checkpoints.load import load
    from qzo.checkpoints.save import beside, save
    from qzo.durable import check_target
    from qzo.live.scales import quantized_bytes
    from qzo.quantizers.quantize import quantize

    target = Path(options.out)
    check_target(target)
    tuned = _tuned(options)
    place = tuned.model if tuned else options.model
    beside(Path(place))  # what cannot be copied is told before the work
    calibration = _calibration(options, place)  # before the model: a text that cannot be read costs no time
    model: Any = tuned.load(dequantize=True) if tuned else load(place)
    quantize(
        model,
        options.bits,
        options.group_size,
        symmetric=not options.asymmetric,
        method=options.method,
        calibration=calibration,
        act_order=options.act_order,
        static_groups=options.static_groups,
        skip=options.skip,
        only=options.only,
    )
    save(model, target, checkpoint_format=options.format)
    for name, size in quantized_bytes(model).items():
        if size:
            print(f"{name:<12}{size:>16,}{'' if name == 'scale_count' else ' bytes'}")


def _tuned(options: argparse.Namespace) -> Tuned | None:
    """What a run became that is given as the model; None for a model. Raises QzoError."""
    from qzo.training.tuned.state import is_tuned, read_tuned

    source = Path(options.model)
    check_moved(options.moved, source, is_tuned(source))
    if not is_tuned(source):
        return None
    tuned = read_tuned(source, model=options.moved)
    if tuned.adapters:
        raise QzoError(
            f"{source} trained adapters, which stand beside the model; qzo export {source} OUT writes them: merge them "
            "with peft (merge_and_unload), and quantize the model that gives"
        )
    return tuned


def _calibration(options: argparse.Namespace, place: str) -> list[Tensor] | None:
    """Batches of calibration text for GPTQ, in the tokens of the model at `place`; progress then goes to stderr."""
    if options.method != "gptq":
        if options.calibration is not None:
            raise QzoError("--calibration needs --method gptq; give both, or neither")
        return None
    from qzo.checkpoints.tokenizer import load_tokenizer
    from qzo.quantizers.calibration import calibration_text, token_batches
    from qzo.tasks.encoding import tokens_of
    from qzo.tasks.source.reviews import REVIEWS

    logging.basicConfig(format="%(message)s")
    logging.getLogger("qzo").setLevel(logging.INFO)
    text = calibration_text(options.calibration or REVIEWS)
    tokenizer = load_tokenizer(place)
    tokenizer.model_max_length = sys.maxsize  # the text is cut afterwards, so its length is no news
    return token_batches(partial(tokens_of, tokenizer), text, options.samples, options.seq_len)
