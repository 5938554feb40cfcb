"""What becomes of d': momentum, Adam, relative steps, signs."""

import copy

import pytest
import torch

from qzo import QZO
from qzo.errors import QzoError


def some_scales(dtype=torch.float32):
    return {"a": (torch.rand(60, 30) * 0.02 + 0.001).to(dtype), "b": (torch.rand(7) * 0.02 + 0.001).to(dtype)}


def quadratic(tensors):
    return lambda: sum(((tensor.float() - 0.013) ** 2).sum() for tensor in tensors.values()) * 10


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


RULES = [
    ({"momentum": 0.9}, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)),
    ({"betas": (0.9, 0.99), "adam_eps": 1e-6}, lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.99), eps=1e-6)),
    ({"directions": 3}, lambda p, lr: torch.optim.SGD(p, lr=lr)),
    ({"betas": (0.9, 0.99), "directions": 2}, lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.99))),
]


@pytest.mark.parametrize(("options", "make_twin"), RULES)
def test_rules_are_those_of_torch_optim_on_the_estimated_gradient(options, make_twin):
    live = some_scales()
    twin = clones(live)
    optimizer = QZO(live, lr=1e-4, nonnegative=False, **options)
    theirs = make_twin(list(twin.values()), 1e-4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(8):
        optimizer.step(quadratic(live) if step != 3 else lambda: float("nan"))
        if step != 3:
            applied = optimizer.last.applied[0]
            for name, tensor in twin.items():
                z = [optimizer.direction(j)[name] for j in range(len(applied))]
                tensor.grad = sum(d * zj for d, zj in zip(applied, z, strict=True)) / len(applied)
            theirs.step()
        scheduler.step()
        theirs.param_groups[0]["lr"] *= 0.9
    torch.testing.assert_close(live, twin, rtol=1e-5, atol=1e-8)


def test_relative_steps_are_those_of_the_equation():
    live = some_scales(torch.float16)
    live["b"][2] = 0
    start = {name: tensor.float() for name, tensor in live.items()}
    seen = []
    optimizer = QZO(live, lr=0.1, eps=1e-2, relative=True, clip_threshold=None)
    optimizer.step(lambda: seen.append(clones(live)) or quadratic(live)())
    z, d = optimizer.direction(), optimizer.last.directional_derivative
    for name, before in start.items():
        torch.testing.assert_close(seen[0][name].float(), before * (1 + 1e-2 * z[name]), rtol=1e-3, atol=1e-6)
        masters = optimizer.state[live[name]]["master"]
        torch.testing.assert_close(masters, (before * (1 - 0.1 * d * z[name])).clamp(min=0))
    assert live["b"][2] == 0
    expected = sum((20 * (b - 0.013) * b * z[name]).sum() for name, b in start.items())
    assert float(expected) == pytest.approx(d, rel=0.01)


def test_relative_is_an_option_of_a_group():
    live = some_scales()
    start = clones(live)
    optimizer = QZO([{"params": {"a": live["a"]}, "relative": True}, {"params": {"b": live["b"]}}], lr=0.0)
    seen = []
    optimizer.step(lambda: seen.append(clones(live)) or 1.0)
    z = optimizer.direction()
    torch.testing.assert_close(seen[0]["a"], start["a"] * (1 + 1e-3 * z["a"]))
    torch.testing.assert_close(seen[0]["b"], start["b"] + 1e-3 * z["b"])


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"betas": (0.9, 0.99)}, {"relative": True, "momentum": 0.5}])
def test_resume_with_buffers_is_bit_identical(tmp_path, options):
    live = some_scales(torch.float16)
    twin = clones(live)
    optimizer = QZO(live, lr=1e-4, **options)
    for _ in range(3):
        optimizer.step(quadratic(live))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = QZO(twin, **options)
    other.step(quadratic(twin))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for _ in range(3):
        optimizer.step(quadratic(live))
        other.step(quadratic(twin))
    ours, theirs = optimizer.truth(), other.truth()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(live[name], twin[name]) for name in live)
    assert pytest.approx(0) != float(ours["0.momentum" if "momentum" in options else "0.exp_avg"].abs().sum())


def test_state_is_none_four_or_eight_bytes_a_scale_beside_the_master():
    for options, extra in (({}, 0), ({"momentum": 0.9}, 4), ({"betas": (0.9, 0.999)}, 8)):
        scale = torch.rand(1000)
        optimizer = QZO([scale], **options)
        optimizer.step(lambda scale=scale: scale.sum())
        tensors = [value for key, value in optimizer.state[scale].items() if key != "updates"]
        assert sum(tensor.nbytes for tensor in tensors) == 1000 * (4 + extra)


def test_one_cycle_moves_momentum_and_betas():
    for options, key in (({"momentum": 0.9}, "momentum"), ({"betas": (0.9, 0.99)}, "betas")):
        live = some_scales()
        optimizer = QZO(live, **options)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
        before = optimizer.param_groups[0][key]
        for _ in range(3):
            optimizer.step(quadratic(live))
            scheduler.step()
        assert optimizer.param_groups[0][key] != before


def test_negative_numbers_are_kept_unless_they_are_forbidden():
    with pytest.raises(QzoError, match="w has negative values"):
        QZO({"w": torch.tensor([0.1, -0.1])}, nonnegative=True)
    groups = QZO(
        [{"params": {"w": torch.tensor([0.1, -0.1])}}, {"params": {"v": torch.tensor([0.1, 0.2])}}]
    ).param_groups
    assert [group["nonnegative"] for group in groups] == [False, True]
    live = {"w": torch.tensor([1e-4, -1e-4])}
    QZO(live, lr=1.0, nonnegative=False, clip_threshold=None).step(lambda: live["w"].sum())
    assert live["w"].min() < -1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"betas": (0.9, 0.99), "adam_eps": 0.0},
        {"betas": (0.9, 0.99), "momentum": 0.9},
        {"nonnegative": "yes"},
        {"nonnegative": 1.5},
        {"relative": []},
        {"relative": 1},
    ],
)
def test_rules_out_of_range_are_refused(options):
    with pytest.raises(QzoError):
        QZO({"a": torch.rand(3)}, **options)
    with pytest.raises(QzoError):
        QZO([{"params": [torch.rand(3)], **options}])


def test_copies_keep_their_buffers():
    live = {"a": torch.rand(400)}
    optimizer = QZO(live, lr=1e-4, betas=(0.9, 0.99))
    optimizer.step(quadratic(live))
    twin = copy.deepcopy(optimizer)
    theirs = {"a": twin.param_groups[0]["params"][0]}
    optimizer.step(quadratic(live))
    twin.step(quadratic(theirs))
    assert torch.equal(live["a"], theirs["a"])
