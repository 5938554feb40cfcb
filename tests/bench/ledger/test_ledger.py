"""The ledger: births, deaths, roles, phases, and agreement with PyTorch's own allocation events."""

import gc

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from bench.ledger.events import highest_rise
from bench.ledger.ledger import Ledger


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def train_step(ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ledger.enter("forward")
    loss = model(torch.ones(32, 64)).square().mean()
    ledger.enter("backward")
    loss.backward()
    ledger.assign("gradients", [parameter.grad for parameter in model.parameters()])
    ledger.enter("step")
    optimizer.step()
    optimizer.zero_grad()
    ledger.assign("optimizer", [item for state in optimizer.state.values() for item in state.values()])


def test_a_storage_counts_from_birth_to_death_and_a_view_counts_nothing():
    with Ledger() as ledger:
        kept = torch.empty(1000)
        view = kept[10:].view(-1)
        gone = torch.empty(500)
        del gone
    assert ledger.live_bytes() == 4000
    assert ledger.peak_bytes() == 6000
    del kept
    assert ledger.live_bytes() == 4000  # the view still holds the storage
    del view
    assert ledger.live_bytes() == 0


def test_sizes_are_rounded_up_to_the_granularity_and_exact_multiples_stay():
    with Ledger(granularity=512) as ledger:
        one, full = torch.empty(1, dtype=torch.uint8), torch.empty(512, dtype=torch.uint8)
        assert ledger.live_bytes() == 1024
    del one, full


def test_other_devices_are_not_counted():
    with Ledger("meta") as ledger:
        here = torch.empty(100)
        there = torch.empty(100, device="meta")
    assert ledger.live_bytes() == 400
    del here, there


def test_roles_of_a_training_step_add_up_to_the_peak_to_the_byte():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ledger = Ledger()
    ledger.assign("weights", model.parameters())
    with ledger:
        for _ in range(2):
            train_step(ledger, model, optimizer)
    peak = ledger.peak()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(peak.roles.values()) == peak.nbytes
    assert peak.roles["weights"] == weights
    assert peak.roles["optimizer"] == 2 * weights + 4 * len(list(model.parameters()))  # moments and step counters


def test_what_forward_leaves_for_backward_is_activations_and_under_no_grad_nothing_is():
    model = mlp()
    with Ledger() as ledger:
        ledger.assign("weights", model.parameters())
        out = model(torch.ones(32, 64))
        kept = {block.role: block.nbytes for block in ledger._live.values()}
        assert sum(block.nbytes for block in ledger._live.values() if block.role == "activations") >= 2 * 32 * 256 * 4
        del out
    assert "activations" in kept
    with Ledger() as ledger, torch.no_grad():
        model(torch.ones(32, 64))
    assert "activations" not in ledger.at_peak()


def test_a_checkpointed_layers_recomputed_activations_are_activations():
    block = mlp()
    with Ledger() as ledger:
        ledger.assign("weights", block.parameters())
        ledger.enter("forward")
        inputs = torch.ones(32, 64, requires_grad=True)
        loss = checkpoint(block, inputs, use_reentrant=False).mean()
        ledger.enter("backward")
        loss.backward()
    backward = ledger.phases.index("backward")
    born = [event.block for event in ledger.events if event.sign > 0 and event.phase == backward]
    assert sum(block.nbytes for block in born if block.role == "activations") == 2 * 32 * 256 * 4


def test_noise_is_what_is_drawn_between_forwards_and_not_dropout_inside_one():
    with Ledger() as ledger:
        z = torch.empty(100).normal_()
        assert ledger.at_peak() == {"noise": 400}
        del z
    with Ledger() as ledger, torch.no_grad():
        nn.Dropout(0.5).train()(torch.ones(10))
    assert "noise" not in ledger.at_peak()


def test_weights_stay_weights_whatever_else_is_said_of_them():
    parameter = nn.Parameter(torch.ones(10))
    ledger = Ledger()
    ledger.assign("weights", [parameter])
    ledger.assign("optimizer", [parameter, None])
    assert ledger.at_peak() == {"weights": 40}


def test_a_role_given_late_counts_from_birth():
    with Ledger() as ledger:
        tensor = torch.empty(100)
        other = torch.empty(50)
        del other
        ledger.assign("gradients", [tensor])
    assert ledger.at_peak() == {"gradients": 400, "temporaries": 200}


def test_a_phase_that_allocates_nothing_of_its_own_counts_what_is_resident():
    with Ledger() as ledger:
        kept = torch.empty(100)
        ledger.enter("quiet")
        torch.empty(1)
    assert ledger.phase_peaks() == {"load": 400, "quiet": 404}
    del kept


@pytest.mark.parametrize("build", ["adamw", "sgd"])
def test_peak_agrees_with_pytorchs_allocation_events(build):
    model = mlp()
    optimizer = (
        torch.optim.AdamW(model.parameters(), fused=True)
        if build == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.1)
    )
    gc.collect()
    ledger = Ledger()
    ledger.assign("weights", model.parameters())
    resident = ledger.live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, ledger:
        for _ in range(2):
            train_step(ledger, model, optimizer)
    allocated = resident + highest_rise(profiler)
    assert 0 <= allocated - ledger.peak_bytes() <= 0.02 * allocated


def test_workspaces_without_a_tensor_can_be_recorded():
    ledger = Ledger(granularity=512)
    block = ledger.allocate(1000, "temporaries")
    ledger.release(block)
    assert ledger.peak_bytes() == 1024
    assert ledger.live_bytes() == 0
