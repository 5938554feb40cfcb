"""GPTQ on whole models: inputs streamed layer by layer, experts, chains, wrong input, checkpoints."""

import copy
import gc
import weakref

import pytest
import torch
from gptq_inputs import ORDERS, correlated
from torch import nn

from qzo import quantize
from qzo.checkpoints.load import load
from qzo.checkpoints.save import save
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.kernels.rounding.gptq import gptq
from qzo.live.scales import scales
from qzo.models.walk import find_sites
from qzo.quantizers.gptq_model import _open_experts
from qzo.quantizers.selection import Selection
from qzo.quantizers.trace import run_model, trace


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 96, (8, 24), generator=generator) for _ in range(count)]


def inputs_of(model, ids):
    """Layer -> what it gets."""
    inputs, handles = {}, []
    for path, layer in model.named_modules():
        if type(layer).__name__ in ("Linear", "Conv1D") and path != "lm_head":
            handles.append(
                layer.register_forward_pre_hook(lambda _, args, path=path: inputs.__setitem__(path, args[0].detach()))
            )
    model(ids)
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_layer_of_a_model_is_closer_than_after_rounding(make_model, family, order):
    model = make_model(family)
    inputs = inputs_of(model, batches(1, seed=7)[0])
    plain = quantize(copy.deepcopy(model), 4, 16)
    found = quantize(copy.deepcopy(model), 4, 16, method="gptq", calibration=batches(), **ORDERS[order])
    assert inputs.keys() == {name.removesuffix(".scales") for name in scales(found)}
    for path, x in inputs.items():
        errors = [
            (other.get_submodule(path)(x) - model.get_submodule(path)(x)).pow(2).sum() for other in (plain, found)
        ]
        assert errors[1] < errors[0], path


def padded(batch):
    mask = torch.ones_like(batch)
    mask[::2, :10] = 0
    return {"input_ids": batch, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("shape", [lambda batch: batch, padded])
def test_layers_get_what_the_quantized_model_feeds_them(make_model, monkeypatch, family, shape):
    """The Hessians against those of whole-model passes, with all layers before replaced."""
    model, seen = make_model(family), []

    def spy(weight, hessian, options, dtype):
        seen.append(hessian.clone())
        return gptq(weight, hessian, options, dtype)

    monkeypatch.setattr("qzo.quantizers.gptq_model.gptq", spy)
    text = [shape(batch) for batch in batches(2)]
    quantize(model, 4, 16, method="gptq", calibration=text)
    expected: dict[str, torch.Tensor] = {}  # in the order of the calls

    def watch(path):
        def hook(_, args):
            rows = args[0].reshape(-1, args[0].shape[-1])
            expected[path] = expected.get(path, 0) + rows.t() @ rows

        return hook

    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(watch(path))
    for batch in text:
        run_model(model, batch)
    assert len(expected) == len(seen) == len(scales(model))
    for path, hessian in zip(expected, seen, strict=True):
        torch.testing.assert_close(hessian, expected[path], rtol=1e-4, atol=1e-4, msg=path)


def test_labels_change_nothing(make_model):
    model, ids = make_model(), batches(1)[0]
    first, second = (
        quantize(copy.deepcopy(model), 4, 16, method="gptq", calibration=[batch]).state_dict()
        for batch in (ids, {"input_ids": ids, "labels": ids})
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_that_read_the_same_input_and_like_experts_share_a_pass(make_model):
    model = make_model("llama")
    plan = trace(model, find_sites(model), ids)
    names = [[[paths[0].rpartition(".")[2] for paths in group] for group in stage.groups] for stage in plan.stages]
    assert names == 2 * [[["q_proj", "k_proj", "v_proj"]], [["o_proj"]], [["gate_proj", "up_proj"]], [["down_proj"]]]
    assert [stage.block for stage in plan.stages] == [0] * 4 + [1] * 4
    assert plan.layers == ["model.layers.0", "model.layers.1"] and not plan.tuples
    model = make_model("mixtral")
    _open_experts(model, Selection(find_sites(model), {}))
    stages = trace(model, find_sites(model), ids).stages
    assert [[len(group) for group in stage.groups] for stage in stages] == 2 * [[3], [1], [1] * 4, [1] * 4]
    assert [stage.visits for stage in stages] == 2 * [1, 1, 4, 4]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_same_text_gives_the_same_codes_and_the_rng_is_left_alone(make_model, family, order):
    model = make_model(family)
    state = torch.get_rng_state()
    first, second = (
        quantize(copy.deepcopy(model), 4, 16, method="gptq", calibration=iter(batches(2)), **ORDERS[order]).state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_experts_are_calibrated_on_their_own_tokens_and_idle_ones_rounded(make_model, input_ids):
    model = make_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[:3] = 0
    plain = quantize(copy.deepcopy(model), 4, 16)
    found = quantize(copy.deepcopy(model), 4, 16, method="gptq", calibration=batches(2))
    same = [
        torch.equal(a.qweight, b.qweight)
        for a, b in zip(
            plain.model.layers[0].mlp.experts.gate_up_proj, found.model.layers[0].mlp.experts.gate_up_proj, strict=True
        )
    ]
    assert sorted(same) == [False, False, True, True]  # with equal votes the router takes the same two experts always
    assert torch.isfinite(found(input_ids).logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_modes_are_those_of_round_to_nearest(make_model, dtype):
    model = make_model("opt", dtype)
    model.model.decoder.layers[0].train()
    plain = quantize(copy.deepcopy(model), 4, 16)
    found = quantize(model, 4, 16, method="gptq", calibration=batches(1))
    assert [(n, t.dtype, t.shape) for n, t in found.state_dict().items()] == [
        (n, t.dtype, t.shape) for n, t in plain.state_dict().items()
    ]
    assert found.model.decoder.layers[0].fc1.training and not found.model.decoder.layers[1].fc1.training
    assert [m.training for m in found.modules()] == [m.training for m in plain.modules()]
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert all("forward" not in vars(layer) and not layer._forward_pre_hooks for layer in found.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_be_quantized_with_it(make_model, input_ids, tied):
    model = make_model("llama", torch.bfloat16, tied)
    before = model(input_ids).logits
    quantize(model, 8, 16, method="gptq", embeddings=8, calibration=batches(2))
    torch.testing.assert_close(model(input_ids).logits, before, rtol=0.05, atol=0.03)


def test_layers_outside_of_the_chain_are_calibrated_too():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=96,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        do_layer_norm_before=False,
    )
    model = OPTForCausalLM(config).eval()
    model.model.decoder.project_out.weight.data.mul_(10)
    plain = quantize(copy.deepcopy(model), 4, 16)
    found = quantize(copy.deepcopy(model), 4, 16, method="gptq", calibration=batches())
    for path in ("project_in", "project_out"):
        codes = [each.model.decoder.get_submodule(path).qweight for each in (plain, found)]
        assert not torch.equal(*codes)


def test_models_without_a_chain_of_layers_are_calibrated_as_a_whole():
    torch.manual_seed(1)
    shared = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(64, 64), shared, nn.ReLU(), shared, nn.Linear(64, 64))
    x = [correlated(64, 64, seed=seed) for seed in range(4)]
    plain, found = (
        quantize(copy.deepcopy(model), 4, 16, **options) for options in ({}, {"method": "gptq", "calibration": x})
    )
    assert found[1] is found[3] and isinstance(found[1], QuantLinear)
    held_out = correlated(64, 64, seed=9)
    errors = [(each(held_out) - model(held_out)).pow(2).sum() for each in (plain, found)]
    assert errors[1] < 0.5 * errors[0]


class Chain(nn.Module):
    """Layers that return tuples; the second has nothing to quantize, the third gets another argument."""

    class Layer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states, scale):
            return hidden_states + scale * self.inner(hidden_states), None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [self.Layer(nn.Linear(64, 64)), self.Layer(nn.Tanh()), self.Layer(nn.Linear(64, 64))]
        )

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(hidden_states=x, scale=float(number + 1))[0]
        return x


def test_layers_without_linear_parts_pass_their_output_on(monkeypatch):
    torch.manual_seed(1)
    model, x, seen = Chain(), correlated(64, 64), []
    monkeypatch.setattr(
        "qzo.quantizers.gptq_model.gptq", lambda w, h, *rest: seen.append(h.clone()) or gptq(w, h, *rest)
    )
    plan = trace(model, find_sites(model), x)
    assert len(plan.layers) == 3 and plan.tuples
    quantize(model, 4, 16, method="gptq", calibration=[x])
    states = x + model.layers[0].inner(x)
    states = states + 2 * torch.tanh(states)
    torch.testing.assert_close(seen[1], states.t() @ states, rtol=1e-4, atol=1e-3)


def test_old_weights_are_freed_layer_by_layer(make_model, monkeypatch):
    model = make_model()
    old = [weakref.ref(layer.weight) for layer in model.model.modules() if type(layer) is nn.Linear]
    alive = []

    def watched(*args):
        gc.collect()
        alive.append(sum(reference() is not None for reference in old))
        return gptq(*args)

    monkeypatch.setattr("qzo.quantizers.gptq_model.gptq", watched)
    quantize(model, 4, 16, method="gptq", calibration=batches(1))
    assert alive == list(range(14, 0, -1)) and not any(reference() for reference in old)


ids = torch.randint(5, 96, (2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs calibration text"),
        ({"calibration": []}, "calibration is empty"),
        ({"calibration": [ids.float()]}, r"batch 0 is torch.float32 \(2, 8\)"),
        ({"calibration": [ids, ids[0]]}, r"batch 1 is torch.int64 \(8,\)"),
        ({"calibration": [ids + 96]}, r"the model knows 0 \.\.\. 95"),
        ({"calibration": [ids.repeat(1, 300)]}, "has 2400 tokens a sequence, but the model reads 2048"),
        ({"calibration": [ids], "damping": 2.0}, "damping=2.0"),
        ({"calibration": [ids], "group_size": 48}, "not divisible by group_size=48"),
        ({"calibration": [ids], "method": "rtn"}, "choose method"),
        ({"method": "rtn", "act_order": True}, "choose method"),
        ({"method": "awq"}, 'method="awq" is not known'),
    ],
)
def test_wrong_input_leaves_the_model_as_it_was(make_model, options, message):
    model = make_model()
    with pytest.raises(QzoError, match=message):
        quantize(model, **{"n_bits": 4, "group_size": 16, "method": "gptq", **options})
    assert not any(isinstance(layer, QuantLinear) for layer in model.modules())


def test_a_model_on_meta_and_a_layer_never_called_are_refused(make_model):
    with pytest.raises(QzoError, match="the model is on meta"):
        quantize(make_model().to("meta"), 4, 16, method="gptq", calibration=[ids])
    model = make_model()
    model.model.idle = nn.Linear(64, 64)
    with pytest.raises(QzoError, match=r"^model\.idle: the model never calls this layer"):
        quantize(model, 4, 16, method="gptq", calibration=[ids])
    assert type(model.model.idle) is nn.Linear


def test_the_layer_with_bad_inputs_is_named(make_model):
    model = make_model()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("inf")
    with pytest.raises(QzoError, match=r"^model\.layers\.1\.mlp\.gate_proj: .*not finite"):
        quantize(model, 4, 16, method="gptq", calibration=[ids])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_checkpoints_come_back_bit_for_bit(make_model, tmp_path, input_ids, order, checkpoint_format):
    model = quantize(make_model("llama"), 4, 16, method="gptq", calibration=batches(2), **ORDERS[order])
    save(model, tmp_path / "model", checkpoint_format=checkpoint_format)
    again = load(tmp_path / "model")
    assert torch.equal(again(input_ids).logits, model(input_ids).logits)
    assert again.model.layers[0].mlp.down_proj.act_order == (order == "act-order")
