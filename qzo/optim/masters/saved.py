"""Masters and what else belongs to each trained tensor, as a state dict holds them."""

from __future__ import annotations

from typing import Any

import torch

from qzo.errors import QzoError
from qzo.optim import offsets


def copied(state: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """`saved` on the device of the master; where `state` has the tensor already, that one takes the values."""
    device = state["master"].device
    return {
        key: state[key].copy_(value)
        if key in state
        else torch.empty_like(value, device="cpu" if key == "updates" else device).copy_(value)
        for key, value in saved.items()
    }


def saved_states(state_dict: dict[str, Any], owned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """State of each tensor in a state dict, in order; QzoError where it does not fit this optimizer's."""
    try:
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        saved = [state_dict["state"][number] for number in numbers]
        shapes = [value["master"].shape for value in saved]
    except KeyError as error:
        raise QzoError("the state dict has no master scales; load one that QZO.state_dict() made") from error
    if len(saved) != len(owned):
        raise QzoError(
            f"the state dict holds {len(saved)} scale tensors, the optimizer {len(owned)}; load one of the same scales"
        )
    for number, (values, shape, state) in enumerate(zip(saved, shapes, owned, strict=True)):
        wanted = state["master"].shape
        if any(value.shape not in (wanted, torch.Size()) for value in values.values()) or shape != wanted:
            raise QzoError(
                f"scale {number} has shape {tuple(shape)} in the state dict, {tuple(wanted)} in the model; load one "
                "of the same model"
            )
        for key in offsets.OFFSET_STATE:
            if (key in values) != (key in state):
                raise QzoError(_unlike_offsets(number, key in values))
    return saved


def _unlike_offsets(number: int, is_saved: bool) -> str:
    if is_saved:
        return (
            f"scale {number} is saved with an offset that follows it, and none does here; make QZO of qzo.scales(model)"
        )
    return (
        f"scale {number} is saved without an offset, and one follows it here; make QZO of "
        "qzo.trainable(model, follow=False), as the state's was"
    )
