"""`qzo replay MODEL JOURNAL [OUT]`: a tuned model rebuilt from its journal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qzo.checkpoints.save import _copy_beside
from qzo.errors import QzoError


def _replay(options: argparse.Namespace) -> None:
    import torch

    from qzo.checkpoints.load import load
    from qzo.checkpoints.save import format_of, save
    from qzo.checkpoints.write import in_own_layout, write_tuned
    from qzo.durable import check_target
    from qzo.journal.lines import read
    from qzo.journal.replay import replay
    from qzo.optim.spsa import live_tensors

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
