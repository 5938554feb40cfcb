"""PEQA: gradients are those of the dequantized weight, and the lean step keeps neither weights nor gradients."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import qzo
from bench.cases.case import BenchCase
from bench.cases.models import resolve
from bench.cases.text import batch
from bench.methods import METHODS
from bench.methods.optimizers.factored import FactoredRms
from bench.methods.peqa import WholeWeight
from bench.worlds import cpu, sim, sim_cpu
from bench.worlds.measured import MeasuredWorld
from qzo.formats.gptq.layer import QuantLinear

K, N, GROUP = 64, 48, 32


def quantized() -> QuantLinear:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    return QuantLinear.from_weight(weight, torch.zeros(N), 4, GROUP)


def scale_gradient(forward, layer: QuantLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    layer.scales = layer.scales.detach().requires_grad_()
    leaf = x.clone().requires_grad_()
    forward(leaf).square().sum().backward()
    return layer.scales.grad, leaf.grad


@pytest.mark.parametrize("kind", ["whole", "in parts"])
def test_gradients_are_those_of_the_dequantized_weight(kind):
    layer, x = quantized(), torch.randn(5, K)
    whole = layer.dequantize().requires_grad_()
    leaf = x.clone().requires_grad_()
    torch.nn.functional.linear(leaf, whole).square().sum().backward()
    codes = whole.detach() / layer.scales.t().repeat_interleave(GROUP, 1)
    expected = (whole.grad * codes).unflatten(1, (-1, GROUP)).sum(2).t()  # [K / g, N]
    of_scales, of_x = scale_gradient(WholeWeight(layer) if kind == "whole" else layer, layer, x)
    assert torch.allclose(of_scales, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(of_x, leaf.grad, rtol=1e-4, atol=1e-4)


def saved_for_backward(forward) -> list[tuple[tuple[int, ...], torch.dtype]]:
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append((tuple(tensor.shape), tensor.dtype)) or tensor, lambda t: t):
        forward(torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True))
    return kept


def test_plain_autograd_keeps_codes_and_weight_and_the_lean_layer_neither():
    layer = quantized()
    layer.scales.requires_grad_()
    kept = saved_for_backward(WholeWeight(layer))
    assert ((K // GROUP, GROUP, N), torch.int8) in kept and ((K, N), torch.bfloat16) in kept
    assert [shape for shape, _ in saved_for_backward(layer)] == [(5, K), (K // GROUP, N)]


def prepare(folder, method: str):
    case = BenchCase(str(folder), method, device="cpu", seq_len=16)
    prepared = METHODS[method](case, MeasuredWorld(resolve(str(folder)), "flash", "cpu"))
    return prepared, batch(resolve(str(folder)), 1, 16, seed=0, step=0)


def test_both_steps_train_all_scales_and_nothing_else(llama_folder):
    losses = []
    for method in ("peqa", "peqa-lean"):
        prepared, tokens = prepare(llama_folder, method)
        scales = qzo.scales(prepared.model)
        trained = {id(scale) for scale in scales.values()}
        tensors = dict(prepared.model.state_dict(keep_vars=True))
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        losses.append([prepared.step(tokens, lambda phase: None) for _ in range(2)])
        moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name, tensor in tensors.items() if id(tensor) in trained}
        assert len(moved) == len(scales) == 14
        assert all(scale.dtype == torch.float32 for scale in scales.values())
        assert losses[-1][1] < losses[-1][0]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)  # the same model, the same label


def test_the_lean_step_has_one_gradient_at_a_time(llama_folder):
    prepared, tokens = prepare(llama_folder, "peqa-lean")
    scales = list(qzo.scales(prepared.model).values())
    alive = []
    for scale in scales:
        scale.register_post_accumulate_grad_hook(lambda _: alive.append(sum(s.grad is not None for s in scales)))
    prepared.step(tokens, lambda phase: None)
    assert alive == [0] * len(scales)  # dropped by the time that the next hook of the same scales runs
    assert all(scale.grad is None for scale in scales)


def test_what_is_kept_of_the_weights_is_three_bytes_each_or_nothing(llama_folder):
    linear = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    plain, lean = (sim.run(BenchCase(str(llama_folder), name, seq_len=16)) for name in ("peqa", "peqa-lean"))
    phases = {phase["name"]: phase["peak_allocated"] for phase in plain["phases"]}
    assert phases["forward"] - phases["load"] > 3 * linear
    assert lean["at_peak"]["activations"] < linear // 2
    assert lean["at_peak"]["gradients"] == 0 and lean["case"]["gradient_checkpointing"] is True
    assert plain["parameters"]["trainable"] == lean["parameters"]["trainable"] == linear // 128
    assert lean["at_peak"]["optimizer"] == 512 * (2 * 14 + 4)  # rows and columns; gate and up have 1 KiB of columns


@pytest.mark.parametrize("method", ["peqa", "peqa-lean"])
def test_predicted_and_measured_peaks_agree(llama_folder, method):
    case = BenchCase(str(llama_folder), method, steps=3, seq_len=48, batch_size=2)
    simulated, measured = sim_cpu.run(case), cpu.run(case)
    scalars, generator = 64, 5056  # bytes; the latter is the CPU's, of which each recomputed layer keeps a copy
    off = measured["peak"]["allocated"] - simulated["peak"]["allocated"]
    assert 0 <= off <= scalars + (2 * generator if method == "peqa-lean" else 0)
    for role in ("weights", "quantization", "gradients", "optimizer"):
        assert simulated["at_peak"][role] == measured["at_peak"][role]


def reference_update(weight, grads, lr, decay):
    rows, columns = torch.zeros(len(weight)), torch.zeros(weight.shape[1])
    for grad in grads:
        square = grad**2 + 1e-30
        rows = decay * rows + (1 - decay) * square.mean(1)
        columns = decay * columns + (1 - decay) * square.mean(0)
        update = grad / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        weight = weight - lr * max(1e-3, float(weight.square().mean().sqrt())) * update
    return weight


@pytest.mark.parametrize("fused", [False, True])
def test_factored_updates_are_those_of_the_formula(fused):
    torch.manual_seed(0)
    weight = torch.rand(6, 9, requires_grad=True)
    start, grads = weight.detach().clone(), [torch.randn(6, 9) for _ in range(3)]
    optimizer = FactoredRms([weight], lr=0.1, decay=0.9)
    if fused:
        optimizer.fuse_into_backward()
    for grad in grads:
        (weight * grad).sum().backward()
        assert (weight.grad is None) == fused
        optimizer.step()
        weight.grad = None
    assert torch.allclose(weight, reference_update(start, grads, 0.1, 0.9), atol=1e-6)
