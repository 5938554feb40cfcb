"""`qzo export RUN OUT`: the tuned tensors of a run, in the checkpoint they came from."""

from __future__ import annotations

import argparse


def _export(options: argparse.Namespace) -> None:
    from qzo.training.export import export

    count = export(options.source, options.out, options.state)
    print(f"{options.out}: {count} tuned tensors written, all else as it came")
