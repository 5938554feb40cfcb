"""LoRA adapters without gradients, and the schedule of adapters first and scales second."""

import copy

import pytest
import torch
from torch import nn

from qzo import QZO, MeZO, Phases, adapters, adapters_then_scales, add_adapters, label_loss, quantize, scales
from qzo.errors import QzoError


@pytest.fixture
def adapted(make_model):
    return add_adapters(quantize(make_model(dtype=torch.bfloat16), 4, 32))


def test_mezo_trains_adapters_and_nothing_else(adapted, input_ids):
    start = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    plain = adapted.base_model.model
    optimizer = MeZO(adapters(adapted), lr=1e-2, eps=1e-2)
    assert len(optimizer.param_groups[0]["params"]) == 8  # A and B for q and v of two layers
    losses = [float(optimizer.step(lambda: label_loss(plain, input_ids, input_ids))) for _ in range(40)]
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed == set(adapters(adapted)) and sum(losses[-5:]) < sum(losses[:5])
    assert all(parameter.grad is None for parameter in adapted.parameters())


def test_adapters_of_a_16_bit_model_work_alike(make_model, input_ids):
    model = add_adapters(make_model(dtype=torch.bfloat16), rank=4, targets=["o_proj"])
    optimizer = MeZO(adapters(model), lr=1e-2)
    optimizer.step(lambda: model(input_ids=input_ids, labels=input_ids).loss)
    assert all("o_proj.lora_" in name for name in optimizer.direction())


def test_first_half_trains_adapters_second_half_the_other_scales(adapted, input_ids):
    schedule = adapters_then_scales(adapted, 5, {"lr": 1e-3}, {"lr": 1e-4})
    first, second = (phase.optimizer for phase in schedule.phases)
    assert isinstance(first, MeZO) and isinstance(second, QZO)
    assert first.param_groups[0]["clip_threshold"] == second.param_groups[0]["clip_threshold"] == 100
    names = second.param_groups[0]["param_names"]
    assert set(scales(adapted)) - set(names) == {
        name for name in scales(adapted) if "q_proj" in name or "v_proj" in name
    }
    seen = []
    for _ in range(5):
        seen.append(schedule.current)
        schedule.step(lambda: adapted(input_ids=input_ids, labels=input_ids).loss)
        assert schedule.last is seen[-1].last and schedule.direction().keys() == seen[-1].direction().keys()
    assert seen == [first, first, second, second, second] and schedule.steps == 5
    with pytest.raises(QzoError, match="all 5 steps"):
        schedule.step(lambda: 1.0)


def test_a_schedule_resumes_from_its_state_dict():
    def make():
        live = {"a": torch.full((30,), 0.5), "b": torch.full((30,), 0.5)}
        return live, Phases([(MeZO({"a": live["a"]}, lr=1e-2), 3), (QZO({"b": live["b"]}, lr=1e-2), 3)])

    live, schedule = make()
    twin, other = make()
    for step in range(6):
        if step == 4:
            twin["a"].copy_(live["a"])
            other.load_state_dict(copy.deepcopy(schedule.state_dict()))
        schedule.step(lambda: sum(tensor.square().sum() for tensor in live.values()))
    for _ in range(2):
        other.step(lambda: sum(tensor.square().sum() for tensor in twin.values()))
    assert all(torch.equal(live[name], twin[name]) for name in live)
    with pytest.raises(QzoError, match="holds 0 phases"):
        other.load_state_dict({})


def test_schedules_that_make_no_sense_are_refused(make_model):
    tensor = torch.rand(3)
    for phases in ([], [(QZO([tensor]), 0)], [(QZO([tensor]), 1), (MeZO([tensor]), 1)]):
        with pytest.raises(QzoError):
            Phases(phases)
    model = quantize(make_model(), 4, 32)
    with pytest.raises(QzoError, match="no LoRA adapter"):
        adapters_then_scales(model, 10)
    with pytest.raises(QzoError, match="cannot be halved"):
        adapters_then_scales(model, 1)
    with pytest.raises(QzoError):
        add_adapters(model, targets=["no_such_layer"])
    with pytest.raises(QzoError):
        adapters(nn.Linear(2, 2))
