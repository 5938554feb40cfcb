"""The first line of a journal: what the run started from, and that a model and optimizer are the same again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo.checkpoints.identity import BASE, MODEL, base_identity
from qzo.errors import QzoError
from qzo.journal.fingerprint import digest, model_hash, noise_fingerprint
from qzo.journal.lines import VERSION
from qzo.kernels import asked
from qzo.kernels.native import is_compiled
from qzo.live.trainable import live_named, offsets
from qzo.models.origin import origin_of
from qzo.optim.mezo import MeZO
from qzo.optim.qzo import QZO
from qzo.optim.rules import update_options
from qzo.optim.spsa import SpsaOptimizer

MADE_BY = {"QZO": QZO, "MeZO": MeZO}
DTYPES = ("float32", "float16", "bfloat16", "float64")
# What a header must have, and of what kind. Later versions added: source, base, threads, carrier.
KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "noise", "torch", "device", "dtype", "optimizer"), str),
    **{"seed": int, "estimator": dict, "offsets": list, "groups": list},
}
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
        "noise": noise_fingerprint(device, optimizer.estimator),
        **{name: value for name, value in zip(("source", "base"), _files(model), strict=True) if value},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "carrier": carrier(),
        "device": device.type,
        "dtype": str(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))[6:],
        "optimizer": kind,
        "seed": optimizer.seed,
        "estimator": optimizer.estimator.options(),
        "offsets": [name for _, name, _, t in optimizer._tensors() if t in getattr(optimizer, "_offsets", {})],
        "groups": groups,
    }


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Raise QzoError for a header that lacks something, or has it in words that are not known here."""
    for name, kind in KEYS.items():
        if name not in header:
            raise QzoError(f"{path}: the header has no {name}; restore the file from a copy")
        if not isinstance(header[name], kind) or isinstance(header[name], bool):
            raise QzoError(
                f"{path}: the header says {name}={header[name]!r}, which is of the wrong kind; restore the file from "
                "a copy"
            )
    for name, known in (("optimizer", tuple(MADE_BY)), ("dtype", DTYPES), ("device", ("cpu", "cuda", "mps", "xpu"))):
        if header[name] not in known:
            raise QzoError(f"{path}: the header says {name}={header[name]!r}; known are {', '.join(known)}")
    groups = header["groups"]
    named = [group["names"] for group in groups if isinstance(group, dict) and isinstance(group.get("names"), list)]
    are_named = len(named) == len(groups) and all(names and all(type(n) is str for n in names) for names in named)
    if not groups or not are_named:
        raise QzoError(f"{path}: the header has no groups of named tensors; restore the file from a copy")


def differences(
    whose: str, begun: dict[str, Any], names: tuple[str, ...] = ("torch", "threads", "carrier")
) -> list[str]:
    """What is other here than where something was begun and may change the last bits of a loss, though no z.

    A name that `begun` does not have, being of an older version, is not compared.
    """
    here = {"torch": torch.__version__, "threads": torch.get_num_threads(), "carrier": carrier()}
    other = [
        f"{name} {begun[name]}, here {here[name]}"
        for name in names
        if str(begun.get(name, here[name])) != str(here[name])
    ]
    if not other:
        return []
    return [f"{whose} was begun with {'; '.join(other)}: losses from here on may differ in their last bits"]


def carrier() -> str:
    """What multiplies by packed codes."""
    if asked.is_carrier():
        return "kernels in Triton"
    return "compiled code" if is_compiled() else "operators"


def _files(model: nn.Module) -> tuple[str | None, str | None]:
    """Where a model's files are, and their hash, with that of what a run had tuned of them; None where it has none."""
    identity, origin = base_identity(model), origin_of(model)
    if BASE not in identity:
        return None, None
    if origin is None or not origin.tuned:
        return identity.get(MODEL), identity[BASE]
    live = live_named(model)
    tuned = digest((name, live[name]) for name in origin.tuned if name in live)
    return identity.get(MODEL), hashlib.sha256(f"{identity[BASE]} {tuned}".encode()).hexdigest()


def device_of(path: Path, header: dict[str, Any]) -> str:
    """The kind of device to replay a journal on: that it was made on, or the CPU where any does.

    Raises QzoError where it is not here, and z cannot be drawn again, or Adam not be repeated, anywhere else.
    """
    device = str(header["device"])
    if device == "cpu" or getattr(torch, device).is_available():
        return device
    is_drawn = header["estimator"].get("noise") == "philox"
    if is_drawn and not _has_adam(header):
        return "cpu"
    reason = "Adam's roots and quotients are rounded" if is_drawn else "z is drawn"
    raise QzoError(
        f"{path} was made on {device}, which this machine does not have, and {reason} otherwise elsewhere; replay it "
        f"on a machine with {device}"
    )


def _has_adam(header: dict[str, Any]) -> bool:
    return any(group.get("betas") for group in header["groups"])


def check_same(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise QzoError where a journal was made with another model, machine, optimizer, or other options.

    lr, eps and clip_threshold may differ: they are in d' and in every line.
    """
    for key, meaning in SHOWN.items():
        if saved[key] != own[key]:
            made = f"torch {saved['torch']} on {saved['device']}" if key == "noise" else f"hash {saved[key][:12]}"
            here = f"torch {own['torch']} on {own['device']}" if key == "noise" else f"this one has {own[key][:12]}"
            raise QzoError(f"{path} is the journal of {meaning} ({made}; {here}); give what it was begun with")
    if saved.get("base") and own.get("base") and saved["base"] != own["base"]:
        raise QzoError(
            f"{path} was begun on {saved.get('source')} with the content {str(saved['base'])[:12]}, and "
            f"{own.get('source')} has {own['base'][:12]}: the codes are the same, other tensors are not; give "
            "the model it was begun on"
        )
    if saved["device"] != own["device"] and _has_adam(saved):
        raise QzoError(
            f"{path} was made on {saved['device']} and this is {own['device']}, where Adam's roots and quotients are "
            f"rounded otherwise; give a model on {saved['device']}"
        )
    for key in ("optimizer", "seed", "estimator"):
        if saved[key] != own[key]:
            raise QzoError(f"{path} was begun with {key}={saved[key]}, not {own[key]}; give the optimizer the same")
    _check_offsets(path, saved["offsets"], own["offsets"])
    fixed = [[_fixed(group) for group in header["groups"]] for header in (saved, own)]
    if fixed[0] != fixed[1]:
        raise QzoError(f"{path} was begun with other parameter groups or options; give the optimizer the same")


def _check_offsets(path: Path, saved: list[str], own: list[str]) -> None:
    """Raise QzoError where other offsets followed their scales in a journal's run than do here."""
    if saved == own:
        return
    remedy = "what it was begun with"
    if not saved or not own:
        remedy = "qzo.scales(model)" if saved else "qzo.trainable(model, follow=False)"
    raise QzoError(
        f"{path} is of a run in which {len(saved)} offsets (GGUF Q4_1, Q5_1, torchao int4) followed their scales, and "
        f"{len(own)} do here; make the optimizer of {remedy}"
    )


def rebuild(model: nn.Module, header: dict[str, Any]) -> SpsaOptimizer:
    """The optimizer that a journal was begun with, on the tensors of `model`. Raises QzoError for missing tensors."""
    known = live_named(model)
    followers = offsets(model) if header["offsets"] else {}
    groups = []
    for saved in header["groups"]:
        missing = [name for name in saved["names"] if name not in known]
        if missing:
            raise QzoError(
                f"the journal trains {missing[0]}, which the model does not have; give the one it was begun with"
            )
        group = {key: value for key, value in saved.items() if key != "names"}
        group["params"] = {name: known[name] for name in saved["names"]}
        following = [name for name in saved["names"] if name in header["offsets"]]
        alone = [name for name in following if name not in followers]
        if alone:
            raise QzoError(
                f"the journal moves an offset with {alone[0]}, which has none in this model; give the one it was begun "
                "with"
            )
        if header["optimizer"] == QZO.__name__:  # no others, whatever the tensors are bound to
            group["offsets"] = {name: followers[name] for name in following}
        groups.append(group)
    estimator = dict(header["estimator"])
    try:
        measured = {"estimator": estimator.pop("sides"), **estimator}
        return MADE_BY[header["optimizer"]](groups, seed=header["seed"], **measured)
    except (TypeError, KeyError, AttributeError) as error:
        raise QzoError(f"the journal's optimizer cannot be made: {error!r}; restore the file from a copy") from error


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as JSON holds them."""
    options = {**update_options(group), "eps": group["eps"], "clip_threshold": group["clip_threshold"]}
    return {**options, "lr": float(options["lr"]), **({"betas": list(group["betas"])} if group.get("betas") else {})}


def _fixed(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("lr", "eps", "clip_threshold")}
