"""Numbers moved by compiled code against PyTorch's operators: the same bits in masters, live tensors and offsets."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

import qzo
from qzo.kernels import moves, native
from qzo.optim import offsets

compiled = pytest.mark.skipif(not native.is_compiled(), reason="the package was installed without a compiler")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
N = 1300  # two tiles and a part of a third


def any_numbers(count):
    """Numbers of every size and sign: subnormal ones, infinity, both zeros, halves between two of fp16 and bf16."""
    numbers = torch.empty(count, dtype=torch.int32).random_(-(2**31), 2**31 - 1)
    numbers[::3] = (torch.randn(len(numbers[::3])) * 10 ** torch.empty(len(numbers[::3])).uniform_(-9, 6)).view(
        torch.int32
    )
    numbers[1::7] &= -(2**12)  # ties of fp16
    numbers[2::7] &= -(2**15)  # and of bf16
    numbers[:8] = torch.tensor([0, -(2**31), 1, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x7F800000])
    return numbers.view(torch.float32)


def assert_same_bits(ours, theirs):
    integers = torch.int32 if ours.dtype == torch.float32 else torch.int16
    numbers = ~theirs.isnan()
    assert torch.equal(ours.isnan(), ~numbers)
    assert torch.equal(ours[numbers].view(integers), theirs[numbers].view(integers))


def flat_of(dtype, stride):
    return torch.zeros(N, stride, dtype=dtype)[:, 0]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 9])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("follows", [False, True])
def test_the_same_bits_as_operators(dtype, stride, relative, nonnegative, follows):
    torch.manual_seed(0)
    master, z, starts = any_numbers(N), any_numbers(N), [any_numbers(N), any_numbers(N)]
    starts[0][::5] = 0
    live, offset, part = flat_of(dtype, stride), flat_of(dtype, stride), slice(100, N - 3)

    value = z[part] * 0.37
    value = value * master[part] if relative else value
    value.add_(master[part])
    value = value.clamp_(min=0) if nonnegative else value
    followed = offsets.following({key: t[part] for key, t in zip(offsets.OFFSET_STATE, starts, strict=True)}, value)

    kept, following = master.clone(), (offset, *starts) if follows else None
    assert moves.can_move(live, kept, following)
    options = {"relative": relative, "nonnegative": nonnegative}
    moves.Moved(live, kept, following).move(100, N - 103, z[part], 0.37, **options)
    assert torch.equal(kept.view(torch.int32), master.view(torch.int32)), "a master changes only where it is kept"
    moves.Moved(flat_of(dtype, stride), kept).move(100, N - 103, z[part], 0.37, keeps=True, **options)
    assert_same_bits(live[part], value.to(dtype))
    assert_same_bits(offset[part], followed.to(dtype) if follows else torch.zeros_like(offset[part]))
    assert_same_bits(kept[part], value)
    assert not live[:100].any() and not live[-3:].any()
    assert torch.equal(kept[:100].view(torch.int32), master[:100].view(torch.int32))


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_make_no_difference(threads, monkeypatch):
    master, z, before = torch.randn(2**16 + 77), torch.randn(2**16 + 77), torch.get_num_threads()
    live = torch.zeros_like(master, dtype=torch.bfloat16)
    torch.set_num_threads(threads)
    try:
        moves.Moved(live, master).move(0, len(z), z, 0.5)
        assert torch.equal(live, (z * 0.5 + master).bfloat16())
        moves.Moved(live, master).move(0, len(z))
        assert torch.equal(live, master.bfloat16())
    finally:
        torch.set_num_threads(before)


@compiled
def test_what_it_does_not_do_is_left_to_operators():
    master, live = torch.zeros(4), torch.zeros(4).half()
    assert moves.can_move(live, master) and moves.can_move(live, master, (live, master, master))
    assert not moves.can_move(live.double(), master) and not moves.can_move(live, master.double())
    assert not moves.can_move(live, master, (live.double(), master, master))
    assert not moves.can_move(live, torch.zeros(4, 2)[:, 0]) and not moves.can_move(live.to("meta"), master)
    with native.by_operators():
        assert not moves.can_move(live, master)


@compiled
def test_fake_tensors_stay_as_they_are():
    with FakeTensorMode():
        live, master = torch.zeros(4).half(), torch.zeros(4)
        assert moves.can_move(live, master)
        moves.Moved(live, master).move(0, 4, torch.zeros(4))


def steps(by, noise, options):
    """Masters, live scales and offsets after three steps, and after a restoring."""
    torch.manual_seed(0)
    blocks, dense = torch.rand(70, 40, 9).half(), torch.rand(30, 50).bfloat16()
    scales = {"a.scales": blocks[..., 0], "b.scales": dense}
    group = {"params": list(scales.items()), "offsets": {"a.scales": blocks[..., 4]}}
    with by():
        made = qzo.QZO([group], lr=1e-3, seed=5, noise=noise, **options)
        made = pickle.loads(pickle.dumps(made))
        kept = [tensor for _, _, _, tensor in made._tensors()]
        seen = []

        def loss():
            seen.extend(tensor.clone() for tensor in kept)
            return sum(float((tensor.float() ** 2).sum()) for tensor in kept)

        for _ in range(3):
            made.step(loss)
        made._restore()
    following = [offset.clone() for offset in made._offsets.values()]
    return [*seen, *kept, *following, *copy.deepcopy(made.truth()).values()]


@compiled
@pytest.mark.parametrize("noise", ["generator", "philox"])
@pytest.mark.parametrize("options", [
    {}, {"relative": True}, {"nonnegative": False}, {"momentum": 0.9}, {"betas": (0.9, 0.99), "relative": True},
    {"directions": 3}, {"directions": 2, "estimator": "one-sided", "relative": True},
])  # fmt: skip
def test_steps_and_what_a_journal_replays_are_the_same_to_the_bit(noise, options):
    ours, theirs = steps(nullcontext, noise, options), steps(native.by_operators, noise, options)
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
