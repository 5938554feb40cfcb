"""Fixtures of the qzo tests: tiny models with random weights, made on the spot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import standin
import torch
from tiny_models import VOCABULARY, tiny_config
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def make_model() -> Make:
    """`make_model("llama", dtype, tied)`: a model with two layers, hidden size 64, in eval mode."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, tied: bool = False) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, tied), dtype=dtype)
        return model.eval()

    return make


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (2, 12))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in the place of `qzo.tasks`; its functions may be exchanged."""
    made = standin.module()
    monkeypatch.setitem(sys.modules, "qzo.tasks", made)
    return made
