"""Each rule for the simulated CPU against the allocation events of the real kernel."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from bench.ledger.events import highest_rise
from bench.ledger.ledger import Ledger
from bench.simulator.cpu.kernels import rules

aten = torch.ops.aten
BF16, FP32 = torch.bfloat16, torch.float32
FEW_BYTES = 64  # scalars that the kernels wrap


Prepared = tuple[tuple[torch.Tensor, ...], Callable[[], object]]  # what exists before, and what runs


def attention(tokens: int, dtype: torch.dtype, backward: bool = False, transposed: bool = False) -> Prepared:
    query, key, value = (torch.empty(2, 3, tokens, 64, dtype=dtype, requires_grad=backward) for _ in range(3))
    grad = torch.empty(2, tokens, 3, 64, dtype=dtype).transpose(1, 2)
    grad = grad if transposed else grad.contiguous()

    def run() -> None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if backward:
            torch.autograd.grad(out, (query, key, value), grad)

    return (query, key, value, grad), run


def masked_softmax(dtype: torch.dtype) -> Prepared:
    scores = torch.zeros(2, 3, 200, 200, dtype=dtype)
    return (scores,), lambda: aten._safe_softmax(scores, -1)


def arithmetic(operator: str, left: torch.dtype, right: torch.dtype) -> Prepared:
    a, b = torch.ones(200, 300, dtype=left), torch.ones(200, 300, dtype=right)
    return (a, b), lambda: getattr(a, operator)(b)


def nf4_product() -> Prepared:
    import bitsandbytes  # noqa: F401  # registers the operator

    x, codes = torch.empty(4, 256, dtype=BF16), torch.zeros(256 * 128 // 2, 1, dtype=torch.uint8)
    absmax = torch.ones(256 * 128 // 64)
    return (x, codes, absmax), lambda: torch.ops.bitsandbytes.gemm_4bit(x, codes, (128, 256), absmax, 64, "nf4")


DTYPES = (BF16, FP32)
CASES = {
    "nf4": nf4_product,
    **{f"softmax {dtype}": partial(masked_softmax, dtype) for dtype in DTYPES},
    **{
        f"{name} {left} {right}": partial(arithmetic, name, left, right)
        for name, left, right in product(("add", "mul_", "sub", "div_"), DTYPES, DTYPES)
    },
    **{
        f"flash {tokens} {dtype}" + " backward" * backward: partial(attention, tokens, dtype, backward)
        for tokens, dtype, backward in product((20, 100, 200, 800), DTYPES, (False, True))
    },
    "flash transposed": partial(attention, 100, BF16, backward=True, transposed=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_the_kernels_own_peak(name):
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    inputs, run = CASES[name]()
    run()  # what is made once is no part of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with FakeTensorMode():
        inputs, simulated = CASES[name]()
        ledger = Ledger("cpu", rules=rules())
        ledger.assign("weights", inputs)
        before = ledger.live_bytes()
        with ledger:
            simulated()
    assert abs(ledger.peak_bytes() - before - highest_rise(profiler)) <= FEW_BYTES
    assert ledger.live_bytes() == before


def test_items_of_fake_tensors_can_be_read_and_constants_keep_their_value():
    with FakeTensorMode(), Ledger("cpu", rules=rules()):
        assert bool(torch.empty(3, dtype=torch.bool).all()) is True
        assert torch.empty(()).item() == 0.0
        assert torch.empty((), dtype=torch.long).item() == 0
        assert torch.tensor(3.0).item() == 3.0


def test_no_layer_is_dropped_by_a_random_number_without_a_value():
    with FakeTensorMode(), Ledger("cpu", rules=rules()):
        assert not torch.rand([]) < 0.0 and not torch.rand([]) < 0.9
        assert torch.rand(3).shape == (3,)
