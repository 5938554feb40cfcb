"""Perturb, restore and update of many scales by one launch, against QZO's operators: the same bits."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from moved_scales import OPTIONS, assert_same, scales, trained
from triton_kernels import on_the_cpu

from qzo import QZO
from qzo.optim.masters import table


@pytest.mark.parametrize("with_offsets", [False, True], ids=["alone", "with offsets"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scales_are_moved_as_operators_move_them_to_the_bit(options, dtype, with_offsets):
    with mock.patch.object(table, "SIZE", 1024):
        found = [trained(carrier(), dtype, with_offsets, **options) for carrier in (nullcontext, on_the_cpu)]
    assert_same(found)
    assert not torch.equal(found[0][0]["b"], found[0][1]["b"])


@pytest.fixture
def operators(monkeypatch):
    """Calls of the operators' moves."""
    calls = []
    for name in ("_perturb_in_chunks", "_restore_in_chunks", "_update_in_chunks"):
        monkeypatch.setattr(QZO, name, lambda self, *arguments, name=name: calls.append(name))
    return calls


def moved(optimizer, live):
    with on_the_cpu():
        optimizer.step(lambda: live["a"].sum())


def test_operators_are_not_called_where_the_kernels_move(operators):
    live, groups = scales(torch.float32)
    moved(QZO(groups, noise="philox"), live)
    assert not operators


@pytest.mark.parametrize("options", [{}, {"noise": "philox", "betas": (0.9, 0.99)}], ids=["generator", "adam"])
def test_operators_move_what_the_kernels_do_not(operators, options):
    live, groups = scales(torch.float32)
    moved(QZO(groups, **options), live)
    assert operators == ["_perturb_in_chunks"] * 2 + ["_update_in_chunks"]


def test_a_table_follows_tensors_that_were_put_elsewhere():
    found = []
    for carrier in (nullcontext, on_the_cpu):
        live, groups = scales(torch.float32)
        optimizer = QZO(groups, noise="philox", lr=1e-5)
        with carrier():
            optimizer.step(lambda: live["a"].square().sum())  # noqa: B023
            live["a"].set_(live["a"].clone())
            optimizer.load_state_dict(optimizer.state_dict())  # new masters
            optimizer.step(lambda: live["a"].square().sum())  # noqa: B023
        found.append([live, optimizer.truth()])
    assert_same(found)
