"""Losses, kernels and offloading of a recipe: the same numbers as the model's own, and the same bytes with data on the
CPU, counted by the ledger, as without.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.cases.recipes.recipe import Recipe
from bench.ledger.ledger import Ledger
from bench.methods.activations.offloading import offloading_of
from bench.methods.liger.layers import FAMILIES, apply_liger
from bench.methods.losses import tiled
from bench.methods.losses.choice import loss_of, replace_loss
from bench.methods.losses.fused import fused_chunk
from bench.methods.optimizers.in_place import numbers, write
from bench.methods.steps import RecipeStep
from bench.simulator.cuda.kernels import read_scalar
from qzo.errors import QzoError

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LIGER = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
READ = {torch.ops.aten._local_scalar_dense.default: partial(read_scalar, False)}


class Anywhere:
    """A world that asks nothing of a recomputation."""

    def recomputing(self):
        return nullcontext()


def built(device="cpu", family="llama", recipe=None, checkpointing=None, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | changes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").train()
    model.config.use_cache = False
    if device == "cpu":
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    if recipe is not None:
        apply_liger(recipe, model)
        replace_loss(recipe, model, Anywhere())
    return model


def stepped(model, offloading=False, rows=2, tokens=40):
    """The ledger of one step, and the gradients before the update."""
    device = next(model.parameters()).device.type
    ids = torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = RecipeStep(model, optimizer, None)
    step._clip = lambda: None
    step.around = offloading_of(model, None) if offloading else nullcontext()
    kept = {}
    optimizer.register_step_pre_hook(
        lambda *_: kept.update({name: item.grad.clone() for name, item in model.named_parameters()})
    )
    ledger = Ledger(device, rules=READ if device == "meta" else None)
    ledger.assign("weights", model.parameters())
    with ledger:
        step([{"input_ids": ids, "labels": ids.clone()}])
    return ledger, kept


def check(recipe, family="llama", exact=True, **changes):
    """Gradients as the model's own; bytes with data as without."""
    ledger, found = stepped(built(family=family, recipe=recipe, **changes))
    _, own = stepped(built(family=family, **changes))
    for name, gradient in own.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=2e-6), name
    simulated, _ = stepped(built("meta", family, recipe, **changes))
    assert simulated.peak_bytes() == ledger.peak_bytes()


@pytest.mark.parametrize("loss, tied", [("chunked", True), ("tiled", False), ("fused", False), ("fused", True)])
def test_a_loss_without_logits_has_the_gradients_of_the_whole_one(monkeypatch, loss, tied):
    monkeypatch.setattr(tiled, "TILE_TOKENS", 32)
    monkeypatch.setattr(tiled, "TILE_WORDS", 128)
    check(Recipe("any", loss=loss, loss_chunk=16), tie_word_embeddings=tied)


@pytest.mark.parametrize("loss", ["chunked", "tiled", "fused"])
def test_a_loss_bends_logits_as_the_architecture_does(loss):
    check(Recipe("any", loss=loss, loss_chunk=16), "gemma2", final_logit_softcapping=2.0)


def test_a_loss_without_logits_holds_less_where_words_are_many():
    sizes = {"vocab_size": 6000, "num_hidden_layers": 1}
    whole, chunked, fused = (
        stepped(built("meta", recipe=Recipe("any", loss=loss, loss_chunk=16), **sizes), tokens=400)[0].peak_bytes()
        for loss in ("full", "chunked", "fused")
    )
    assert max(chunked, fused) < 0.5 * whole


def test_a_chunk_of_the_fused_loss_has_logits_as_large_as_the_hidden_states():
    assert fused_chunk(4 * 4096, 32000, 4096) == 2048  # Liger's own example
    assert fused_chunk(2048, 128256, 2048) == 64
    assert fused_chunk(1, 300, 32) == 1


def test_liger_fuses_the_loss_unless_told_otherwise():
    assert loss_of(Recipe("any", {"use_liger_kernel": True})) == "fused"
    assert loss_of(Recipe("any", LIGER)) == "full"
    assert loss_of(Recipe("any", LIGER, loss="tiled")) == "tiled"
    assert loss_of(Recipe("any")) == "full"


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "olmo2", "exaone4"])
def test_liger_layers_have_the_gradients_of_the_models_own(family):
    check(Recipe("any", LIGER), family)


def test_liger_layers_hold_less_and_what_is_switched_off_stays():
    off = dict.fromkeys(("fused_linear_cross_entropy", "rms_norm", "swiglu", "rope"), False)
    without, swiglu, both = (
        stepped(built("meta", recipe=Recipe("any", LIGER | {"liger_kernel_config": off | kernels})))[0].peak_bytes()
        for kernels in ({"rope": True}, {"swiglu": True}, {"swiglu": True, "rms_norm": True})
    )
    assert without == stepped(built("meta"))[0].peak_bytes()  # queries and keys are turned where they are
    assert both < swiglu < without


def test_a_family_that_liger_is_not_simulated_for_is_refused_in_one_line():
    with pytest.raises(QzoError, match="Liger's kernels for cohere are not simulated; leave it out, or choose one of"):
        built("meta", "cohere", Recipe("any", LIGER))
    assert "mixtral" not in FAMILIES


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_offloaded_activations_come_back_as_they_were(checkpointing):
    options = {"checkpointing": checkpointing, "num_hidden_layers": 6}
    ledger, found = stepped(built(**options), offloading=True)
    kept, own = stepped(built(**options))
    assert all(torch.allclose(found[name], own[name], rtol=1e-5, atol=1e-7) for name in own)
    simulated, _ = stepped(built("meta", **options), offloading=True)
    assert simulated.peak_bytes() == ledger.peak_bytes()
    if checkpointing is None:
        assert ledger.peak_bytes() < 0.6 * kept.peak_bytes()


def test_an_offloaded_tensor_stays_until_five_later_ones_were_saved_and_small_ones_and_parameters_never_go():
    weight = torch.nn.Parameter(torch.ones(64, 64))
    layer = torch.nn.Linear(1, 1)
    layer.weight = weight
    offloading = offloading_of_nothing(layer)
    large = [torch.ones(512) for _ in range(7)]
    numbers_of = [offloading._pack(tensor) for tensor in large]
    assert sorted(offloading.leaving) == numbers_of[-5:]
    assert offloading.tracked[offloading._pack(torch.ones(8))].numel() == 8
    assert offloading.tracked[offloading._pack(weight.data)] is not None and len(offloading.leaving) <= 5
    again = offloading._pack(large[-1])
    assert isinstance(offloading.tracked[again], torch.Tensor)  # of the same storage as one on its way


def test_the_cache_is_emptied_before_the_backward_of_every_so_many_steps():
    model = built()
    step = RecipeStep(model, torch.optim.SGD(model.parameters(), lr=0.0), None)
    told = []
    step.clear_every, step.clear = 2, lambda: told.append("clear")
    rows = torch.ones(1, 4, dtype=torch.long)
    for number in range(3):
        step([{"input_ids": rows, "labels": rows}] * 2, lambda phase, number=number: told.append(f"{phase} {number}"))
    cleared = [told[at - 1 : at + 2] for at, word in enumerate(told) if word == "clear"]
    assert cleared == [[f"forward {number}", "clear", f"backward {number}"] for number in (0, 0, 2, 2)]


def offloading_of_nothing(layer):
    layer.get_output_embeddings = lambda: None
    return offloading_of(layer, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_go_into_a_tensor_and_out_of_it_as_pytorch_rounds_them(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    tensor = torch.empty(1000, dtype=dtype)
    write(tensor, values.numpy())
    assert torch.equal(tensor, values.to(dtype))
    assert torch.equal(torch.from_numpy(numbers(tensor)), tensor.float())
