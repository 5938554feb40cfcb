"""What holds for every quantization format: one list of claims over the `CASES` of all `cases_*.py` beside this file.

Expected numbers come from the library of the format, or from dense fp64 twins of the layers.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from format_cases import FormatCase, stored_codes
from safetensors.torch import save_file
from tiny_models import write_plain
from torch import Tensor, nn

import qzo
from bench.ledger.ledger import Ledger
from qzo import QZO, trainable
from qzo.formats.layer import RebuiltLinear
from qzo.kernels import rebuilt as chunked
from qzo.live.scales import quantized_bytes, quantized_layers
from qzo.training.tuned.export import TRAINED

HELPERS = Path(__file__).parents[1] / "helpers"
CASES: list[FormatCase] = [
    case for file in sorted(HELPERS.glob("cases_*.py")) for case in import_module(file.stem).CASES
]
WITH = {"relative": True, "eps": 1e-3, "clip_threshold": None}
INPUT_IDS = torch.randint(5, 96, (4, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Made:
    """A case with the checkpoint that its library wrote."""

    case: FormatCase
    path: Path

    def model(self) -> nn.Module:
        return qzo.load(self.path, torch.float32, dequantize=False)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FormatCase], Made]:
    """`make(case)`: its checkpoint, written once; a case without its library skips."""
    plain: dict[str, Path] = {}
    made: dict[str, Made] = {}

    def make(case: FormatCase) -> Made:
        missing = [name for name in case.needs if not find_spec(name)]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}")
        if case.family not in plain:
            plain[case.family] = write_plain(case.family, tmp_path_factory.mktemp("plain"))
        key = f"{case.name}-{case.family}"
        if key not in made:
            path = tmp_path_factory.mktemp(key) / f"model{case.suffix}"
            case.write(plain[case.family], path)
            made[key] = Made(case, path)
        return made[key]

    return make


@pytest.fixture(params=CASES, ids=lambda case: f"{case.name}-{case.family}")
def made(request: pytest.FixtureRequest, make: Callable[[FormatCase], Made]) -> Made:
    return make(request.param)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


def loss_of(model: nn.Module) -> Tensor:
    """In fp64 from the logits: differences of 2 eps d must be seen."""
    outputs = model(INPUT_IDS).logits[:, :-1].double()
    return nn.functional.cross_entropy(outputs.flatten(0, 1), INPUT_IDS[:, 1:].flatten())


def dense(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same function with plain weights."""
    twin = copy.deepcopy(model)
    for path, layer in quantized_layers(model).items():
        rows, columns = (weight := layer.dequantize(torch.float32)).shape
        if layer.is_table:
            plain: nn.Module = nn.Embedding(rows, columns)
        else:
            plain = nn.Linear(columns, rows, layer.bias is not None)
            if layer.bias is not None:
                plain.bias.data = layer.bias.detach().clone()
        plain.weight.data = weight.clone()
        twin.set_submodule(path, plain)
    return twin.to(dtype)


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the model holds, as bytes."""
    tensors = {**model.state_dict(), **qzo.scales(model)}
    return {name: tensor.detach().clone().contiguous().view(-1).view(torch.uint8) for name, tensor in tensors.items()}


def files_of(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tuned(made: Made, steps: int = 50, follow: bool = True) -> tuple[nn.Module, list[float]]:
    model = made.model()
    optimizer = QZO(trainable(model, follow=follow), lr=3e-2, **WITH)
    return model, [float(optimizer.step(lambda: loss_of(model))) for _ in range(steps)]


def export(made: Made, model: nn.Module, folder: Path) -> Path:
    """What `qzo.export` writes of a checkpoint of QZOTrainer with the model's scales."""
    folder.mkdir()
    scales = {name: scale.detach().clone().contiguous() for name, scale in qzo.scales(model).items()}
    save_file(scales, folder / TRAINED, {"model": str(made.path)})
    assert qzo.export(folder, folder / "out") == len(scales)
    return folder / "out" / made.path.name if made.case.suffix else folder / "out"


def test_the_model_computes_what_the_library_computes(made):
    expected = made.case.logits(made.path, INPUT_IDS)
    torch.testing.assert_close(logits(made.model()), expected, rtol=0, atol=made.case.tolerance)


def test_the_scales_found_are_all_scales_of_the_checkpoint(made):
    model = made.model()
    found, expected = qzo.scales(model, vocabulary=True), made.case.scales(made.path)
    assert found.keys() == {f"{path}.scales" for path in expected}
    for path, scales in expected.items():
        assert torch.equal(found[f"{path}.scales"].float().flatten(), scales.float().flatten()), path
    sizes = quantized_bytes(model)
    assert sizes["scale_count"] == sum(scales.numel() for scales in expected.values())
    assert sizes["scales"] == sum(scales.numel() * scales.element_size() for scales in found.values())


def test_the_scales_are_live_and_perturbing_them_is_undone_to_the_bit(made):
    model = made.model()
    before, loss = bits_of(model), float(loss_of(model))
    assert qzo.check_live(model, lambda: loss_of(model))
    optimizer = QZO(trainable(model), lr=0.0, **WITH)
    seen = []
    optimizer.step(lambda: seen.append(float(loss_of(model))) or seen[-1])
    assert len({loss, *seen}) == 3
    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    after = bits_of(model)
    assert after.keys() == before.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert float(loss_of(model)) == loss


def test_d_is_the_directional_derivative_of_the_dense_model_within_one_percent(made):
    """Along the way that the weights really took: scales in 16 bits are the rounding of master ± eps z."""
    model = made.model()
    layers = quantized_layers(model)
    optimizer = QZO(trainable(model), lr=0.0, **WITH)
    twin = dense(model, torch.float64)
    weights = {path: twin.get_submodule(path).weight for path in layers}
    gradients = torch.autograd.grad(loss_of(twin), list(weights.values()))
    seen, exact = [], []
    for _ in range(4):
        ways: list[dict[str, Tensor]] = []

        def watched(ways=ways):
            ways.append({path: layer.dequantize(torch.float32) for path, layer in layers.items()})
            return loss_of(model)

        optimizer.step(watched)
        seen.append(optimizer.last.directional_derivative)
        moved = [(ways[0][path] - ways[1][path]).double() / (2 * WITH["eps"]) for path in layers]
        exact.append(sum(float((a * b).sum()) for a, b in zip(gradients, moved, strict=True)))
    difference = torch.tensor(seen) - torch.tensor(exact)
    assert difference.norm() < 0.01 * torch.tensor(exact).norm(), (seen, exact)


def test_gradients_of_the_scales_are_those_of_the_dense_model(made):
    """By the chain rule along one random way of the scales, in which weights are linear."""
    model = made.model()
    layers = {path: layer for path, layer in quantized_layers(model).items() if isinstance(layer, RebuiltLinear)}
    if not layers:
        return  # the views of GGUF blocks have gradients in tests of their own
    twin = dense(model, torch.float64)
    weights = {path: twin.get_submodule(path).weight for path in layers}
    of_weights = torch.autograd.grad(loss_of(twin), list(weights.values()))
    for layer in layers.values():
        layer.scales.requires_grad_()
    of_scales = torch.autograd.grad(loss_of(model), [layer.scales for layer in layers.values()])
    for (path, layer), of_weight, of_scale in zip(layers.items(), of_weights, of_scales, strict=True):
        with torch.no_grad():
            scales, weight = layer.scales.clone(), layer.dequantize(torch.float32)
            layer.scales.mul_(1 + 0.1 * torch.randn(layer.scales.shape))
            way = (layer.scales - scales).double()
            expected = float((of_weight * (layer.dequantize(torch.float32) - weight)).sum())
        assert float((of_scale * way).sum()) == pytest.approx(expected, rel=0.01, abs=1e-5), path


def test_adapters_on_the_layers_are_qlora(made):
    model = made.model()
    expected = logits(model)
    wrapped = qzo.add_adapters(model)
    torch.testing.assert_close(logits(wrapped), expected)
    wrapped(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(tensor.grad is not None for name, tensor in qzo.adapters(wrapped).items() if "lora_B" in name)


def test_fifty_steps_lower_the_loss_of_a_batch(made):
    _, losses = tuned(made)
    assert losses[-1] < losses[0] - 0.05


def test_export_changes_scales_alone_and_the_library_reads_the_tuned_model(made, tmp_path):
    case, original = made.case, files_of(made.path)
    codes = stored_codes(case, made.path)
    model, _ = tuned(made, 20, follow=False)  # offsets stay, so scales are all that changes
    out = export(made, model, tmp_path / "trained")
    assert files_of(made.path) == original and files_of(out) != original
    after = stored_codes(case, out)
    assert after.keys() == codes.keys()
    assert not [name for name in codes if not torch.equal(after[name], codes[name])]
    expected = case.logits(out, INPUT_IDS)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=case.tolerance)
    assert (case.logits(made.path, INPUT_IDS) - expected).abs().max() > 10 * case.tolerance
    again = qzo.load(out, torch.float32, dequantize=False)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=case.tolerance)


def test_peak_of_a_step_is_below_floor_one_dequantized_layer_and_activations(made, monkeypatch):
    """With chunks of a quarter of the largest layer, as those of real models are; masters are the optimizer's own."""
    model = made.model()
    largest = max(layer.dequantize().numel() for layer in quantized_layers(model).values())
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", largest // 4)
    twin = dense(model, torch.float32)
    plain = peak_of(twin, lambda: float(twin(INPUT_IDS, labels=INPUT_IDS).loss))
    activations = plain - held_bytes(twin)
    optimizer = QZO(trainable(model), **WITH)
    masters = sum(state["master"].nbytes for state in optimizer.state.values())
    peak = peak_of(model, lambda: optimizer.step(lambda: model(INPUT_IDS, labels=INPUT_IDS).loss))
    assert peak + masters <= 1.1 * (held_bytes(model) + masters + 4 * largest + activations)


def held_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def peak_of(model: nn.Module, run: Callable[[], object]) -> int:
    """Highest sum of living bytes, those of the model included."""
    with torch.no_grad(), Ledger() as ledger:
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.see(tensor)
        assert ledger.live_bytes() == held_bytes(model)
        run()
    return ledger.peak_bytes()
