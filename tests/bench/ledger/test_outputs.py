"""Outputs from memory: the same tensors as the meta kernels make, and the same events in every method."""

import pytest
import torch

from bench.cases.case import BenchCase
from bench.cases.methods import METHODS
from bench.ledger import outputs
from bench.ledger.outputs import MetaOutputs
from bench.simulator.allocator.replay import replay
from bench.worlds import sim

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layout(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.untyped_storage().nbytes()


CALLS = [
    (aten.mul.Tensor, (meta(4, 1, 6), meta(5, 6)), {}),
    (aten.add.Tensor, (meta(4, 6), meta(4, 6, dtype=torch.float32)), {"alpha": 2}),
    (aten.mm.default, (meta(4, 6), meta(8, 6).t()), {}),
    (aten.neg.default, (meta(2, 3, 4).transpose(1, 2),), {}),
    (aten.cat.default, ([meta(2, 3), meta(2, 5)], 1), {}),
    (aten._to_copy.default, (meta(2, 3),), {"dtype": torch.float32}),
    (aten.native_dropout.default, (meta(2, 3), 0.1, True), {}),
    (aten._foreach_sqrt.default, ([meta(2, 3), meta(4)],), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS)
def test_a_remembered_output_is_that_of_the_kernel(func, args, kwargs):
    run = MetaOutputs()
    first, second = run(func, args, kwargs), run(func, args, kwargs)
    assert len(run._layouts) == 1
    assert type(first) is type(second)
    pairs = zip(first, second, strict=True) if isinstance(first, (tuple, list)) else [(first, second)]
    for one, other in pairs:
        assert layout(one) == layout(other)
        assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (meta(2, 3), [6])),
        (aten._unsafe_view.default, (meta(2, 3), [6])),  # a view, though its schema does not say so
        (aten.add_.Tensor, (meta(2, 3), meta(2, 3))),
    ],
)
def test_views_and_writes_into_an_argument_are_always_run(func, args):
    run = MetaOutputs()
    for _ in range(2):
        out = run(func, args, {})
        assert out.untyped_storage()._cdata == args[0].untyped_storage()._cdata
    assert not run._layouts


def test_numbers_of_equal_value_and_another_type_are_another_kind():
    run = MetaOutputs()
    whole = meta(3, dtype=torch.int64)
    assert run(aten.mul.Tensor, (whole, 1), {}).dtype is torch.int64
    assert run(aten.mul.Tensor, (whole, 1.0), {}).dtype is torch.float32


def test_a_tensor_on_another_device_is_never_remembered():
    run = MetaOutputs()
    assert [int(run(aten.add.Tensor, (torch.tensor(1), value), {})) for value in (1, 2)] == [2, 3]
    assert not run._layouts


def events(case: BenchCase, monkeypatch) -> list[tuple]:
    """Sign, bytes, role and phase of every event of the steps, and which allocation a release belongs to.

    Of the steps alone: when the model dies after them depends on Python's garbage collector.
    """
    seen = []
    monkeypatch.setattr(sim, "replay", lambda ledger: seen.extend(ledger.events) or replay(ledger))
    sim.run(case)
    numbers: dict[int, int] = {}
    for event in seen:
        numbers.setdefault(id(event.block), len(numbers))
    return [(event.sign, event.block.nbytes, event.block.role, event.phase, numbers[id(event.block)]) for event in seen]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, str]:
    """Number of layers -> a small Llama."""
    from transformers import LlamaConfig

    folders = {}
    for layers in (2, 4):
        folders[layers] = str(tmp_path_factory.mktemp(f"layers-{layers}"))
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, vocab_size=100,
            num_key_value_heads=2, architectures=["LlamaForCausalLM"],
        ).save_pretrained(folders[layers])  # fmt: skip
    return folders


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_memory_changes_no_event_of_a_step(method, checkpointing, models, monkeypatch):
    case = BenchCase(models[4], method, batch_size=2, seq_len=32, gradient_checkpointing=checkpointing)
    quick = events(case, monkeypatch)
    monkeypatch.setattr(outputs.MetaOutputs, "__call__", lambda self, func, args, kwargs: func(*args, **kwargs))
    assert quick == events(case, monkeypatch)


def test_a_deeper_model_needs_no_more_kernels_of_its_own(models, monkeypatch):
    asked = {}  # a call that ran a kernel has a set of its own; the items of a list, as of all norms, share one
    original = outputs._layouts
    monkeypatch.setattr(
        outputs, "_layouts", lambda out, taken: asked.update({id(taken): taken}) or original(out, taken)
    )
    counts = []
    for folder in models.values():
        sim.run(BenchCase(folder, "lora", seq_len=32, gradient_checkpointing=True))
        counts.append(len(asked))
        asked.clear()
    assert counts[0] == counts[1] > 0
