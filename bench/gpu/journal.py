"""Steps on a GPU that any machine takes again: `python -m bench.gpu.journal --out FILE`, elsewhere `--replay FILE`.

A small model is trained along z of Philox, with a journal. The file holds that journal and the hash of the masters at
its end; a replay, on a CPU or another card, must come to the same bits. Codes and scales are made of Philox too, so
that the model is the same wherever it is made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qzo
from bench.records.environment import environment
from bench.records.files import read_json, write_json
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.journal.fingerprint import digest
from qzo.kernels.philox import Stream, draw_by_operators

WIDTH, STEPS = 256, 40
OPTIONS: dict[str, Any] = {"lr": 3e-6, "noise": "philox", "directions": 3, "momentum": 0.9, "clip_threshold": 20.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write, 0; or replay, 0 where the bits are the same, else 1; 2 for what is no such file."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.journal", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where to train, or to replay")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, help="JSON file to write")
    wanted.add_argument("--replay", type=Path, help="JSON file that was written")
    options = parser.parse_args(arguments)
    try:
        if options.out is not None:
            write_json(options.out, {"environment": environment()} | trained(options.device))
            return 0
        found = read_json(options.replay)
        same = replayed(found["journal"], options.device) == found["masters"]
    except (QzoError, KeyError, TypeError) as error:
        print(f"error: {options.replay or options.out}: {error}", file=sys.stderr)
        return 2
    print(f"{STEPS} steps of {found['device']} on {options.device}: {'the same bits' if same else 'OTHER BITS'}")
    return int(not same)


def trained(device: str) -> dict[str, Any]:
    """The journal of a run and the hash of its masters."""
    model, x = network().to(device), numbers(2, 8 * WIDTH).view(8, WIDTH).to(device, torch.bfloat16)
    optimizer = qzo.QZO(qzo.scales(model), **OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.journal"
        with qzo.Journal(path, model, optimizer, snapshot_every=None) as journal:
            for _ in range(STEPS):
                optimizer.step(lambda: (model(x).float() - 1).square().mean())
                journal.record()
        return {"device": device, "journal": path.read_text(), "masters": digest(optimizer.truth().items())}


def replayed(journal: str, device: str) -> str:
    """The hash of the masters after a replay."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.journal"
        path.write_text(journal)
        optimizer, _ = qzo.replay(network().to(device), path)
    return digest(optimizer.truth().items())


def network() -> nn.Module:
    """Two quantized layers."""
    weights = [(numbers(index, WIDTH * WIDTH) * 0.05).view(WIDTH, WIDTH).bfloat16() for index in range(2)]
    first, second = (QuantLinear.from_weight(weight, None, 4, 64) for weight in weights)
    return nn.Sequential(first, nn.Tanh(), second)


def numbers(index: int, count: int) -> Tensor:
    """Seventeen values around 0, in an order that is the same everywhere."""
    found = torch.empty(count)
    draw_by_operators(found, 0, Stream(0, 0, index, 0), "binomial")
    return found


if __name__ == "__main__":
    sys.exit(main())
