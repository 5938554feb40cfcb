"""The proof, before the first step, that the scales are live."""

import random
import sys

import pytest
import standin
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, TrainingArguments

import qzo
from qzo import QuantLinear, QzoError, check_live, load, quantize, scales
from qzo.commands.main import main
from qzo.formats.gptq.layer import QuantLinear as Layer
from qzo.training.tuned.state import model_with


class CachedLinear(QuantLinear):
    """Dequantizes once and keeps the weight, as some inference kernels do."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = self.dequantize(x.dtype)
        return nn.functional.linear(x, self.kept, self.bias)


def cache(model, paths=None):
    """Make layers of the model, all without `paths`, keep their weights."""
    for path, module in model.named_modules():
        if type(module) is Layer and (paths is None or path in paths):
            module.__class__ = CachedLinear
    return model


def loss_of(model, input_ids):
    return lambda: model(input_ids, labels=input_ids).loss


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_scales_pass_and_are_restored_to_the_bit(make_model, input_ids, family, dtype):
    model = quantize(make_model(family, dtype), 4, 32)
    start = {name: scale.clone() for name, scale in scales(model).items()}
    logits = model(input_ids).logits
    for seed in range(3):
        assert check_live(model, loss_of(model, input_ids), seed)[0] + ".scales" in start
    assert all(torch.equal(scales(model)[name], start[name]) for name in start)
    assert torch.equal(model(input_ids).logits, logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_layer_is_drawn_by_the_seed_and_within_the_trained_ones(make_model, input_ids):
    model = quantize(make_model(), 4, 32)
    loss = loss_of(model, input_ids)
    drawn = [check_live(model, loss, seed)[0] for seed in range(8)]
    assert drawn == [check_live(model, loss, seed)[0] for seed in range(8)] and len(set(drawn)) > 2
    assert all(".layers.1." in check_live(model, loss, seed, (1, 1))[0] for seed in range(8))


def test_a_weight_that_is_kept_is_refused_with_layer_class_and_remedy(make_model, input_ids):
    model = cache(quantize(make_model(), 4, 32))
    start = {name: scale.clone() for name, scale in scales(model).items()}
    with pytest.raises(QzoError) as caught:
        check_live(model, loss_of(model, input_ids))
    message = str(caught.value)
    assert message.startswith("model.layers.") and "this CachedLinear does not compute with them" in message
    assert "load the model with qzo.load" in message and "\n" not in message
    assert all(torch.equal(scales(model)[name], start[name]) for name in start)


def test_one_class_of_layers_that_keeps_its_weights_among_live_ones_is_found(make_model, input_ids):
    model = cache(quantize(make_model(), 4, 32), {"model.layers.1.mlp.up_proj"})
    for seed in range(3):
        with pytest.raises(QzoError, match=r"model\.layers\.1\.mlp\.up_proj: .* CachedLinear"):
            check_live(model, loss_of(model, input_ids), seed)


def test_experts_that_no_token_is_sent_to_are_not_drawn(make_model):
    model = quantize(make_model("mixtral"), 4, 32)
    for block in model.model.layers:  # the router's choice is then the same for every token: two experts of four
        block.mlp.gate.weight.data.zero_()
    loss, called = loss_of(model, torch.randint(5, 96, (2, 12))), set()
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, out, path=path: called.add(path) if getattr(out, "numel", int)() else None
        )
    for seed in range(20):
        (path,) = check_live(model, loss, seed)
        assert path in called
    assert len([path for path in called if "_proj." in path]) == 2 * 2 * 2


def test_up_to_three_layers_are_tried():
    class Switched(nn.Module):
        def __init__(self, weights):
            super().__init__()
            layers = [QuantLinear.from_weight(torch.randn(32, 32), group_size=32) for _ in weights]
            self.layers, self.weights = nn.ModuleList(layers), weights

        def forward(self, x):
            return sum(weight * layer(x) for weight, layer in zip(self.weights, self.layers, strict=True))

    x = torch.randn(4, 32)
    for weights, live in (([0, 0, 1], True), ([0, 0, 0, 0], False)):
        model = Switched(weights)
        for seed in range(6):
            if live:
                assert check_live(model, lambda: model(x).square().mean(), seed) == ["layers.2"]  # noqa: B023
            else:
                calls = []
                with pytest.raises(QzoError, match="QuantLinear does not compute with them"):
                    check_live(model, lambda: calls.append(1) or model(x).square().mean(), seed)  # noqa: B023
                assert len(calls) == 2 + 3


def test_the_noise_of_the_loss_is_not_taken_for_an_effect(make_model, input_ids):
    model, dice = cache(quantize(make_model(), 4, 32)), iter([0.0, 1.0, 0.5, 0.4, 0.6])
    with pytest.raises(QzoError, match="CachedLinear"):
        check_live(model, lambda: float(model(input_ids, labels=input_ids).loss) + next(dice))


class Normed(nn.Module):
    """A norm follows the layer, so that a factor common to all its scales cancels to the bit."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([QuantLinear.from_weight(torch.randn(64, 32), group_size=32)])

    def forward(self, x):
        y = self.layers[0](x)
        return y / y.square().mean(-1, keepdim=True).sqrt()


def test_a_norm_after_the_layer_does_not_hide_its_scales():
    model, x = Normed(), torch.randn(4, 32)
    before = model(x)
    model.layers[0].scales.mul_(2)
    assert torch.equal(before, model(x))  # the symmetry
    for seed in range(8):
        assert check_live(model, lambda: model(x)[:, 0].sum(), seed) == ["layers.0"]


def test_no_scales_of_a_model_with_norms_after_attention_and_mlp_are_called_dead(input_ids):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma3TextConfig(vocab_size=96, num_hidden_layers=1, head_dim=16, initializer_range=0.4, **shape)
    model = quantize(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), 4, 32)
    drawn = {check_live(model, lambda: float(loss_of(model, input_ids)()), seed)[0] for seed in range(20)}
    assert len({path.rpartition(".")[2] for path in drawn}) == 7


@pytest.mark.parametrize("value", [0.0, 7.5])
def test_a_loss_that_cannot_move_is_no_dead_scale(make_model, input_ids, value):
    model = quantize(make_model(), 4, 32)
    assert check_live(model, lambda: float(model(input_ids).logits.sum()) * 0 + value)
    with pytest.raises(QzoError, match=f"leave the loss at {value:g} and the logits"):
        check_live(cache(model), lambda: float(model(input_ids).logits.sum()) * 0 + value)


def test_queries_and_keys_of_single_tokens_do_not_use_up_all_tries(make_model):
    model, tokens = quantize(make_model(), 4, 32), torch.tensor([[7], [9]])
    dead = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qk"]
    assert not {check_live(model, lambda: float(model(tokens).logits.sum()), seed)[0] for seed in range(20)} & {*dead}


def test_a_number_that_becomes_nan_has_not_moved(make_model, input_ids):
    model = cache(quantize(make_model(), 4, 32))
    start = {name: scale.clone() for name, scale in scales(model).items()}

    def loss():
        same_scales = all(torch.equal(scales(model)[name], start[name]) for name in start)
        return float(model(input_ids, labels=input_ids).loss) if same_scales else float("nan")

    with pytest.raises(QzoError, match="CachedLinear"):
        check_live(model, loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_that_are_not_finite_before_the_first_step_are_blamed_on_the_dtype(make_model, input_ids, dtype):
    model = quantize(make_model(dtype=dtype), 4, 32)
    model.model.norm.weight.data.fill_(float("inf"))
    remedy = r"load it with dtype=torch\.bfloat16 \(--dtype bfloat16\)" if dtype == torch.float16 else "qzo inspect"
    with pytest.raises(QzoError, match=f"not finite, in {str(dtype)[6:]}, before any step; .*{remedy}"):
        check_live(model, loss_of(model, input_ids))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_left_to_the_steps(make_model, value):
    assert check_live(quantize(make_model(), 4, 32), lambda: value) == []


def test_an_error_of_the_loss_restores_the_scales(make_model, input_ids):
    model = quantize(make_model(), 4, 32)
    start = {name: scale.clone() for name, scale in scales(model).items()}
    calls = iter([1.0, 1.0])
    with pytest.raises(StopIteration):
        check_live(model, lambda: model(input_ids) and next(calls))
    assert all(torch.equal(scales(model)[name], start[name]) for name in start)
    with pytest.raises(QzoError, match=r"call qzo\.quantize"):
        check_live(make_model(), lambda: 1.0)


@pytest.fixture
def folder(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qzo.tasks", standin.module())
    return standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True)


@pytest.mark.parametrize("layers", [None, "1-1"])
def test_qzo_train_refuses_before_the_first_step(folder, tmp_path, monkeypatch, capsys, layers):
    monkeypatch.setattr("qzo.training.tuned.start.model_with", lambda *arguments: cache(model_with(*arguments)))
    command = ["train", str(folder), *standin.PAPER, "--steps", "4", "--out", str(tmp_path / "run")]
    command += [] if layers is None else ["--layers", layers]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model.layers.") and "CachedLinear" in error
    assert not (tmp_path / "run").exists()


def test_qzo_train_checks_once_and_not_when_a_finished_run_is_resumed(folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("qzo.training.task.check_live", lambda *arguments: calls.append(arguments))
    command = ["train", str(folder), *standin.PAPER, "--steps", "3", "--out", str(tmp_path / "run")]
    assert main(command) == 0 and len(calls) == 1
    assert main([*command, "--resume"]) == 0 and len(calls) == 1
    command[command.index("3")] = "5"
    assert main([*command, "--resume"]) == 0 and len(calls) == 2


def test_the_trainer_refuses_before_its_first_step(folder, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    words = [random.Random(seed).choices(range(5, 96), k=8) for seed in range(8)]
    data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in words]
    trainer = qzo.QZOTrainer(cache(load(folder)), arguments, train_dataset=data)
    with pytest.raises(QzoError, match="CachedLinear"):
        trainer.train()
    assert trainer.zeroth_order.steps == 0
