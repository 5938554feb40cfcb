"""The measured CPU world on a small model, and its bf16 products."""

import gc
import json
import mmap

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from bench.cases.case import BenchCase
from bench.cases.methods import METHODS
from bench.cases.models import resolve
from bench.cases.text import batch
from bench.ledger.events import highest_rise, rises
from bench.ledger.ledger import Ledger
from bench.methods import METHODS as functions
from bench.simulator.cpu.gemm import BLOCK, BlockedBf16, product
from bench.simulator.cpu.kernels import PRODUCTS
from bench.simulator.cpu.scratch import inside, takes_scratch
from bench.worlds import cpu
from bench.worlds.measured import MeasuredWorld
from bench.worlds.watch import register_resident


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny-llama")
    LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2000, max_position_embeddings=128, architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    return str(path)


class Inside(TorchDispatchMode):
    """The most bytes that a kernel which multiplies in bf16 takes inside itself, as the kernel tells."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        multiplies = func in PRODUCTS or "flash_attention" in func.__name__
        if multiplies and takes_scratch(*(item for item in args if isinstance(item, torch.Tensor))):
            self.bytes = max(self.bytes, inside(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def prepare(folder, method, attention="flash"):
    """The method's model and step, and tokens for it."""
    source = resolve(folder)
    case = BenchCase(folder, method, device="cpu", seq_len=64)
    prepared = functions[method](case, MeasuredWorld(source, attention, "cpu"))
    return prepared, [batch(source, 1, 64, seed=0, step=step) for step in range(2)]


def taken_inside(folder, method):
    prepared, (first, _) = prepare(folder, method)
    with cpu.fast_bf16(), Inside() as kernels:
        prepared.step(first, lambda phase: None)
    return kernels.bytes


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured_and_agrees_with_pytorchs_allocation_events(folder, method):
    record = cpu.run(BenchCase(folder, method, device="cpu", seq_len=64, steps=4))
    assert record["status"] == "ok" and record["world"] == "measured-cpu"
    assert len(record["losses"]) == 4 and record["step_seconds"] > 0
    allocated = record["peak"]["allocated"]
    assert sum(record["at_peak"].values()) == allocated
    unattributed = record["at_peak"]["unattributed"]
    assert unattributed <= 0.02 * allocated + taken_inside(folder, method)
    assert (cpu.INSIDE in record["notes"]) == (unattributed > 0)
    assert record["peak"]["reserved"] is None  # a CPU has no caching allocator
    assert record["peak"]["process"] > allocated
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("method", ["ft-mixed", "lora", "mezo", "qzo"])
def test_the_ledger_is_neither_above_nor_below_the_allocation_events(folder, method):
    prepared, batches = prepare(folder, method)
    ledger = Ledger()
    register_resident(ledger, prepared)
    ledger.enter("forward")
    _, phases = cpu.watch_steps(prepared, ledger, batches)
    allocated = max(phases.values())
    above = allocated - ledger.peak_bytes()
    assert -0.02 * allocated <= above <= 0.02 * allocated + taken_inside(folder, method)


def test_peak_rss_is_that_of_the_steps_and_not_of_the_profiler(folder):
    record = cpu.run(BenchCase(folder, "qzo", device="cpu", seq_len=64, steps=4))
    assert record["peak"]["process"] <= cpu.peak_rss()
    assert record["phases"][0]["name"] == "load"
    loaded = record["phases"][0]["peak_allocated"]
    assert (
        loaded
        <= record["at_peak"]["weights"] + record["at_peak"]["quantization"] + record["at_peak"]["optimizer"] + 4096
    )


def test_nothing_of_the_largest_parameters_size_is_born_in_a_zeroth_order_step_outside_the_forward(folder):
    for method in ("mezo", "qzo"):
        prepared, (first, _) = prepare(folder, method, "eager")
        ledger = Ledger()
        register_resident(ledger, prepared)
        largest = 2000 * 256 * 2  # the embedding in bf16
        start = len(ledger.events)
        with ledger:
            prepared.step(first, ledger.enter)
        outside = {"perturb", "update"}
        born = [e for e in ledger.events[start:] if e.sign > 0 and ledger.phases[e.phase] in outside]
        assert born and max(event.block.nbytes for event in born) < largest


def test_highest_rise_is_that_of_the_allocation_events():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(100)
    del second, third
    assert highest_rise(profiler) == 6000


def test_rises_are_those_of_each_phase():
    def work(batch, enter):
        enter("forward")
        kept = torch.empty(1000)
        enter("backward")
        del kept
        enter("forward")
        return float(len(torch.empty(1500)))

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cpu.marked(work)(None, lambda phase: None)
    assert rises(profiler) == {"": 0, "forward": 6000, "backward": 4000}


@pytest.mark.parametrize("method", ["ft-bf16", "qzo"])
def test_the_highest_phase_is_the_peak(folder, method):
    """With what oneDNN takes inside its products, which no ledger sees."""
    record = cpu.run(BenchCase(folder, method, device="cpu", seq_len=64, steps=3))
    highest = max(phase["peak_allocated"] for phase in record["phases"])
    assert highest == record["peak"]["allocated"] == sum(record["at_peak"].values())


def test_peak_rss_counts_from_the_reset():
    cpu.reset_peak_rss()
    before = cpu.peak_rss()
    block = mmap.mmap(-1, 64 << 20)  # new pages: malloc may hand out some that are resident already
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    after = cpu.peak_rss()
    block.close()
    assert 60 << 20 <= after - before < 200 << 20
    cpu.reset_peak_rss()
    assert cpu.peak_rss() < after


@pytest.mark.parametrize(
    "shape", [(3, 5, 7), (128, 64, BLOCK // 128), (2100, 64, 600), (600, 64, 2100), (8, BLOCK // 4, 8), (1, 1, 1)]
)
def test_blocked_products_are_rounded_fp32_products(shape):
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).bfloat16()
    right = torch.randn(inner, columns, generator=generator).bfloat16()
    exact = left.float() @ right.float()
    assert torch.allclose(product(left, right).float(), exact, rtol=2**-7, atol=1e-2)


def test_blocked_products_serve_linear_layers_forward_and_backward():
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 16).bfloat16()
    x = torch.randn(4, 8, 32).bfloat16()
    reference = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    with BlockedBf16():
        y = layer(x)
        y.sum().backward()
    assert torch.allclose(y.float(), reference, atol=0.05)
    assert torch.allclose(layer.weight.grad.float(), x.float().sum((0, 1)).expand(16, 32), rtol=0.02, atol=0.1)


def test_the_peak_does_not_depend_on_when_garbage_is_collected(folder):
    case = BenchCase(folder, "lora", "cpu", batch_size=1, seq_len=16, steps=3)
    wanted = cpu.run(case)["peak"]["allocated"]
    left = [torch.empty(2**20)]
    left.append(left)
    del left
    assert cpu.run(case)["peak"]["allocated"] == wanted
    before = gc.get_threshold()
    gc.set_threshold(20, 1, 1)
    try:
        assert cpu.run(case)["peak"]["allocated"] == wanted
    finally:
        gc.set_threshold(*before)
