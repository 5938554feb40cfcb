"""`qzo quantize MODEL OUT`: a checkpoint in the layout of GPTQ."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qzo.checkpoints.save import _copy_beside
from qzo.errors import QzoError

if TYPE_CHECKING:
    from torch import Tensor


def _quantize(options: argparse.Namespace) -> None:
    from qzo.checkpoints.load import load
    from qzo.checkpoints.save import save
    from qzo.durable import check_target
    from qzo.live.scales import quantized_bytes
    from qzo.quantizers.quantize import quantize

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
    from qzo.checkpoints.load import load_tokenizer
    from qzo.quantizers.calibration import calibration_text, token_batches
    from qzo.tasks.reviews import REVIEWS

    logging.basicConfig(format="%(message)s")
    logging.getLogger("qzo").setLevel(logging.INFO)
    text = calibration_text(options.calibration or REVIEWS)
    tokenizer = load_tokenizer(options.model)
    tokenizer.model_max_length = sys.maxsize  # the text is cut afterwards, so its length is no news
    return token_batches(
        lambda string: tokenizer.encode(string, add_special_tokens=False), text, options.samples, options.seq_len
    )
