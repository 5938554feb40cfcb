"""QZO against its slow twin; what a step must leave alone; saving and going on."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
from reference import ReferenceSpsa

from qzo import QZO, quantize, scales
from qzo.errors import QzoError
from qzo.kernels import native
from qzo.models.loss import label_loss


def some_scales(dtype=torch.float16):
    """Two tensors of several chunks and a small one, with a quadratic loss that tells their elements apart."""
    shapes = {"a": (300, 251), "b": (7,), "c": (130, 129)}
    return {name: (torch.rand(shape) * 0.02).to(dtype) for name, shape in shapes.items()}


def quadratic(tensors):
    def closure():
        return sum(((tensor.float() - 0.013) ** 2).sum() for tensor in tensors.values())

    return closure


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_threshold", [None, 1.0])
def test_ten_steps_equal_the_slow_reference_bit_for_bit(dtype, clip_threshold):
    live = some_scales(dtype)
    twin = copies(live)
    optimizer = QZO(live, lr=1e-4, clip_threshold=clip_threshold, seed=5)
    reference = ReferenceSpsa(twin, 1e-4, 1e-3, clip_threshold, seed=5, masters=True)
    for step in range(10):
        optimizer.step(quadratic(live))
        d = reference.step(quadratic(twin))
        assert optimizer.last.directional_derivative == d and optimizer.last.step == step
        assert optimizer.last.clipped == (clip_threshold is not None and abs(d) > clip_threshold)
        assert_same(live, twin)
        masters = {name: optimizer.state[tensor]["master"] for name, tensor in live.items()}
        assert_same(masters, reference.theta)


@pytest.mark.parametrize("distribution", ["binomial", "rademacher"])
@pytest.mark.parametrize("by_operators", [False, True])
def test_steps_along_z_of_philox_equal_the_slow_reference_bit_for_bit(distribution, by_operators):
    live = {name: (torch.rand(shape) * 0.02).half() for name, shape in {"a": (67, 43), "b": (7,)}.items()}
    twin = copies(live)
    optimizer = QZO(live, lr=1e-4, seed=-5, noise="philox", distribution=distribution)
    reference = ReferenceSpsa(twin, 1e-4, 1e-3, 100.0, -5, masters=True, distribution=distribution)
    with native.by_operators() if by_operators else contextlib.nullcontext():
        for _ in range(3):
            optimizer.step(quadratic(live))
            assert optimizer.last.directional_derivative == reference.step(quadratic(twin))
            assert_same(live, twin)
        assert_same(optimizer.direction(), reference.z)


def test_step_returns_the_mean_of_both_losses_read_once_each():
    live = some_scales()
    reads = []

    class Loss(float):
        def __float__(self):
            reads.append(1)
            return super().__float__()

    optimizer = QZO(live)
    mean = optimizer.step(lambda: Loss(quadratic(live)()))
    assert len(reads) == 2 and mean == (optimizer.last.loss_plus + optimizer.last.loss_minus) / 2


def test_directional_derivative_agrees_with_autograd(make_model, input_ids):
    model = quantize(make_model(), 4, 32)
    live = scales(model)
    labels = input_ids.clone()
    optimizer = QZO(live, lr=0.0, eps=1e-5)
    optimizer.step(lambda: label_loss(model, input_ids, labels))
    for tensor in live.values():
        tensor.requires_grad_()
    label_loss(model, input_ids, labels).backward()
    direction = optimizer.direction()
    exact = sum(float((tensor.grad * direction[name]).sum()) for name, tensor in live.items())
    assert exact == pytest.approx(optimizer.last.directional_derivative, rel=0.02)


def test_training_lowers_the_loss(make_model, input_ids):
    model = quantize(make_model(dtype=torch.bfloat16), 4, 32)
    optimizer = QZO(scales(model), lr=1e-5, eps=1e-4)
    losses = [optimizer.step(lambda: label_loss(model, input_ids, input_ids)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.1


def test_perturbations_are_direction_times_eps_and_the_step_is_minus_lr_d_z():
    live = some_scales(torch.float32)
    start = copies(live)
    seen = []
    optimizer = QZO(live, lr=1e-3, eps=1e-3, clip_threshold=0.01)
    optimizer.step(lambda: seen.append(copies(live)) or quadratic(live)())
    direction = optimizer.direction()
    d = optimizer.last.directional_derivative
    assert optimizer.last.clipped and abs(d) > 0.01
    for name, z in direction.items():
        assert torch.equal(seen[0][name], start[name] + z * 1e-3)
        assert torch.equal(seen[1][name], start[name] + z * -1e-3)
        expected = (start[name] + z * (-1e-3 * math.copysign(0.01, d))).clamp(min=0)
        assert torch.equal(live[name], expected)


def test_scales_never_fall_below_zero():
    live = {"a": torch.full((50,), 1e-3)}
    optimizer = QZO(live, lr=1.0, clip_threshold=None)
    optimizer.step(lambda: live["a"].sum() * 100)
    assert live["a"].min() == 0 and live["a"].max() > 0


def test_updates_too_small_for_fp16_add_up_in_the_masters():
    live = {"a": torch.full((1000,), 0.01, dtype=torch.float16)}
    optimizer = QZO(live, lr=1e-7, eps=1e-3)
    optimizer.step(lambda: live["a"].float().sum())
    assert (live["a"] == 0.01).float().mean() > 0.5
    assert (optimizer.state[live["a"]]["master"] != torch.tensor(0.01).half().float()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 1])
def test_a_loss_that_is_not_finite_is_skipped_and_nothing_changes(bad, when):
    live = some_scales()
    start = copies(live)
    optimizer = QZO(live)
    losses = iter([bad, 1.0] if when == 0 else [1.0, bad])
    optimizer.step(lambda: next(losses))
    assert optimizer.last.skipped and not optimizer.last.clipped
    assert_same(live, start)
    first = optimizer.direction()["b"]
    optimizer.step(quadratic(live))
    assert not optimizer.last.skipped and not torch.equal(optimizer.direction()["b"], first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_losses_that_are_never_finite_again_name_another_dtype_where_one_helps(dtype):
    live = {"a": torch.full((4,), 0.01, dtype=dtype)}
    losses = iter([1.0, 1.5] + [math.nan] * 20)
    optimizer = QZO(live)
    with pytest.raises(QzoError, match="those of the last good step; lower lr or eps, or look at the data") as caught:
        for _ in range(11):
            optimizer.step(lambda: next(losses))
    assert ("--dtype bfloat16" in str(caught.value)) == (dtype == torch.float16)


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_travels_on_and_leaves_the_scales_as_they_were(when, error):
    live = some_scales()
    start = copies(live)
    optimizer = QZO(live)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > when:
            raise error("out of memory")
        return 1.0

    with pytest.raises(error, match="out of memory"):
        optimizer.step(closure)
    assert_same(live, start)
    assert optimizer.steps == 0 and optimizer.last is None


def test_global_rng_is_neither_read_nor_moved():
    live = some_scales()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        fresh = copies(live)
        QZO(fresh).step(quadratic(fresh))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(fresh)
    assert_same(*results)


def test_resume_is_bit_identical(tmp_path):
    live = some_scales()
    start = copies(live)
    optimizer = QZO(live, lr=1e-4, seed=9)
    for _ in range(3):
        optimizer.step(quadratic(live))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for _ in range(3):
        optimizer.step(quadratic(live))
    other = QZO(start, lr=1.0, seed=0)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert other.steps == 3 and other.seed == 9 and other.param_groups[0]["lr"] == 1e-4
    for _ in range(3):
        other.step(quadratic(start))
    assert_same(live, start)
    for name in live:
        ours, theirs = optimizer.state[live[name]]["master"], other.state[start[name]]["master"]
        assert theirs.dtype == torch.float32 and torch.equal(ours, theirs)
    assert_same(optimizer.direction(), other.direction())


def test_loading_writes_the_live_scales():
    live = some_scales()
    optimizer = QZO(live, lr=1e-3)
    optimizer.step(quadratic(live))
    trained, saved = copies(live), copy.deepcopy(optimizer.state_dict())
    optimizer.step(quadratic(live))
    optimizer.load_state_dict(saved)
    assert_same(live, trained)


@pytest.mark.parametrize("spoil", ["seed", "master", "count", "shape"])
def test_foreign_state_dicts_are_refused(spoil):
    live = some_scales()
    optimizer = QZO(live)
    state = copy.deepcopy(optimizer.state_dict())
    if spoil == "seed":
        del state["seed"]
    elif spoil == "master":
        del state["state"][1]["master"]
    elif spoil == "count":
        state["param_groups"][0]["params"].pop()
    else:
        state["state"][0]["master"] = torch.zeros(3)
    with pytest.raises(QzoError):
        optimizer.load_state_dict(state)
    assert optimizer.state[live["a"]]["master"].shape == (300, 251)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_alike(duplicate):
    live = {"a": torch.rand(40).half()}
    optimizer = QZO(live, lr=1e-3, seed=4)
    optimizer.step(quadratic(live))
    twin = duplicate(optimizer)
    theirs = {"a": twin.param_groups[0]["params"][0]}
    assert twin.last == optimizer.last and theirs["a"] is not live["a"]
    optimizer.step(quadratic(live))
    twin.step(quadratic(theirs))
    assert_same(live, theirs)


def test_schedulers_and_groups_have_options_of_their_own():
    live = some_scales(torch.float32)
    start = copies(live)
    groups = [{"params": {"a": live["a"]}, "lr": 0.0}, {"params": [("b", live["b"]), ("c", live["c"])], "eps": 1e-2}]
    optimizer = QZO(groups, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    optimizer.step(quadratic(live))
    assert torch.equal(live["a"], start["a"]) and not torch.equal(live["b"], start["b"])
    assert set(optimizer.direction()) == {"a", "b", "c"}
    scheduler.step()
    frozen = copies(live)
    optimizer.step(quadratic(live))
    assert_same(live, frozen)


def test_group_added_later_has_masters():
    live = some_scales()
    optimizer = QZO([live["a"]])
    optimizer.add_param_group({"params": live["b"], "lr": 1e-3})
    assert optimizer.state[live["b"]]["master"].dtype == torch.float32
    optimizer.step(quadratic(live))
    assert set(optimizer.direction()) == {"0", "1"}


def test_a_tensor_named_twice_moves_once():
    live = {"a": torch.rand(20)}
    twin = copies(live)
    twice, once = QZO({"x": live["a"], "y": live["a"]}, lr=1e-3), QZO({"x": twin["a"]}, lr=1e-3)
    twice.step(quadratic(live))
    once.step(quadratic(twin))
    assert_same(live, twin)
    with pytest.raises(QzoError, match="more than one parameter group"):
        twice.add_param_group({"params": [("z", live["a"])]})


def test_views_with_a_stride_are_trained_in_place():
    whole = torch.rand(6, 5, 2)
    start = whole.clone()
    live = {"a": whole[..., 0]}
    QZO(live, lr=1e-2).step(quadratic(live))
    assert torch.equal(whole[..., 1], start[..., 1]) and not torch.equal(whole[..., 0], start[..., 0])
    with pytest.raises(QzoError, match="no flat view"):
        QZO({"a": torch.rand(6, 5).t()})


@pytest.mark.parametrize(
    "options", [{"lr": -1e-9}, {"lr": math.nan}, {"eps": 0.0}, {"eps": -1.0}, {"clip_threshold": 0.0}, {"seed": 1.5}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(QzoError, match=next(iter(options))):
        QZO({"a": torch.rand(3)}, **options)
    QZO({"a": torch.rand(3)}, lr=0.0, clip_threshold=None)


@pytest.mark.parametrize(
    "params",
    [
        {},
        [],
        torch.rand(3),
        {"a": 3.0},
        {"a": torch.arange(3)},
        [("a", "b")],
        {torch.rand(3)},
        [{}],
        {"a": torch.rand(3).double()},
    ],
)
def test_what_cannot_be_trained_is_refused(params):
    with pytest.raises(QzoError):
        QZO(params)


def test_misuse_of_step_and_direction_is_explained():
    live = {"a": torch.rand(3)}
    optimizer = QZO(live)
    with pytest.raises(QzoError, match="no step was taken"):
        optimizer.direction()
    with pytest.raises(QzoError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(QzoError, match="scalar"):
        optimizer.step(lambda: torch.ones(2))


def test_a_step_runs_on_meta():
    live = {"a": torch.empty(300, 200, dtype=torch.float16, device="meta")}
    optimizer = QZO(live)
    optimizer.step(lambda: 1.0)
    assert optimizer.state[live["a"]]["master"].is_meta and optimizer.direction()["a"].shape == (300, 200)
