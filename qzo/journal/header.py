"""The first line of a journal: what the run started from, and that a model and optimizer are the same again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo.errors import QzoError
from qzo.journal.fingerprint import model_hash, noise_fingerprint
from qzo.journal.lines import VERSION
from qzo.live.trainable import live_named, offsets
from qzo.optim.mezo import MeZO
from qzo.optim.qzo import QZO
from qzo.optim.rules import update_options
from qzo.optim.spsa import SpsaOptimizer

MADE_BY = {"QZO": QZO, "MeZO": MeZO}
SHOWN = {"model": "another model", "noise": "a machine or PyTorch that draws other random numbers"}


def describe(model: nn.Module, optimizer: SpsaOptimizer) -> dict[str, Any]:
    """The header of a journal: everything that replaying needs to know beside the model.

    Raises QzoError for an optimizer that a journal cannot rebuild.
    """
    kind = type(optimizer).__name__
    if MADE_BY.get(kind) is not type(optimizer):
        raise QzoError(f"a {kind} cannot be replayed; give a qzo.QZO or qzo.MeZO")
    if isinstance(optimizer, MeZO) and not optimizer.exact:
        raise QzoError("MeZO(exact=False) leaves rounding errors behind that no journal holds; use exact=True")
    names = [name for _, name, _, _ in optimizer._tensors()]
    device = next(optimizer._tensors())[3].device
    groups, first = [], 0
    for group in optimizer.param_groups:
        last = first + len(group["params"])
        groups.append({"names": names[first:last], **_plain(group)})
        first = last
    return {
        "qzo_journal": VERSION,
        "model": model_hash(model, optimizer),
        "noise": noise_fingerprint(device, optimizer.estimator.distribution),
        "torch": torch.__version__,
        "device": device.type,
        "dtype": str(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))[6:],
        "optimizer": kind,
        "seed": optimizer.seed,
        "estimator": asdict(optimizer.estimator),
        "offsets": [name for _, name, _, t in optimizer._tensors() if t in getattr(optimizer, "_offsets", {})],
        "groups": groups,
    }


def check_same(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise QzoError where a journal was made with another model, machine, optimizer, or other options.

    lr, eps and clip_threshold may differ: they are in d' and in every line.
    """
    for key, meaning in SHOWN.items():
        if saved[key] != own[key]:
            made = f"torch {saved['torch']} on {saved['device']}" if key == "noise" else f"hash {saved[key][:12]}"
            here = f"torch {own['torch']} on {own['device']}" if key == "noise" else f"this one has {own[key][:12]}"
            raise QzoError(f"{path} is the journal of {meaning} ({made}; {here}); give what it was begun with")
    for key in ("optimizer", "seed", "estimator", "offsets"):
        if saved[key] != own[key]:
            raise QzoError(f"{path} was begun with {key}={saved[key]}, not {own[key]}")
    fixed = [[_fixed(group) for group in header["groups"]] for header in (saved, own)]
    if fixed[0] != fixed[1]:
        raise QzoError(f"{path} was begun with other parameter groups or options; give the optimizer the same")


def rebuild(model: nn.Module, header: dict[str, Any]) -> SpsaOptimizer:
    """The optimizer that a journal was begun with, on the tensors of `model`. Raises QzoError for missing tensors."""
    known = live_named(model)
    followers = offsets(model) if header["offsets"] else {}
    groups = []
    for saved in header["groups"]:
        missing = [name for name in saved["names"] if name not in known]
        if missing:
            raise QzoError(f"the journal trains {missing[0]}, which the model does not have")
        group = {key: value for key, value in saved.items() if key != "names"}
        group["params"] = {name: known[name] for name in saved["names"]}
        following = [name for name in saved["names"] if name in header["offsets"]]
        alone = [name for name in following if name not in followers]
        if alone:
            raise QzoError(
                f"the journal moves an offset with {alone[0]}, which has none in this model; give the one it was begun "
                "with"
            )
        groups.append({**group, **({"offsets": {name: followers[name] for name in following}} if following else {})})
    estimator = dict(header["estimator"])
    measured = {"estimator": estimator.pop("sides"), **estimator}
    return MADE_BY[header["optimizer"]](groups, seed=header["seed"], **measured)


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as JSON holds them."""
    options = {**update_options(group), "eps": group["eps"], "clip_threshold": group["clip_threshold"]}
    return {**options, "lr": float(options["lr"]), **({"betas": list(group["betas"])} if group.get("betas") else {})}


def _fixed(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("lr", "eps", "clip_threshold")}
