"""Recipes as the Trainer of transformers runs them, predicted: single facts; all measured ones in test_measurements."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from bench.cases import gpus
from bench.cases.models import ModelSource
from bench.cases.recipes.recipe import Recipe, parse
from bench.methods.optimizers.made import optimizer_of
from bench.simulator.cuda.autocast import MetaAutocast
from bench.validation.recipes import described, predict, predict_row, shapes_of
from qzo.errors import QzoError

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SOURCE = ModelSource("tiny", LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=4096, max_position_embeddings=1024))
H100 = gpus.get("h100-80gb")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BF16 = {"bf16": True}


def figures(arguments=BF16, **changes):
    return predict(Recipe("any", dict(arguments), **{"lengths": (256,), **changes}), SOURCE, H100)


def states(optim, model=None):
    """Bytes on the device of what an optimizer keeps, and of the weights it is for, after a step."""
    model = model or torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(1000, 200), "wide": torch.nn.Linear(500, 1000), "small": torch.nn.Linear(4, 4)}
    )
    model.to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = optimizer_of(Recipe("any", {"optim": optim}), model)
    optimizer.step()
    seen = {
        tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor)
    }
    return sum(tensor.nbytes for tensor in seen if tensor.is_meta)


TABLE, WIDE, SMALL = 1000 * 200, 500 * 1000, 1000 + 4 * 4 + 4  # weights of an embedding, a layer, and the rest


def test_optimizers_keep_what_they_keep_on_a_gpu():
    weights = TABLE + WIDE + SMALL
    assert states("adamw_torch_fused") - 8 * weights <= 5 * 4  # steps
    assert states("sgd") == 0
    blocks = -(-WIDE // 256)
    eight = 2 * (WIDE + 4 * blocks) + 8 * (TABLE + SMALL)  # embeddings and what is below 4,096 numbers stay in fp32
    assert 0 <= states("adamw_bnb_8bit") - eight <= 2 * 4 * 256
    paged = 8 * SMALL + 2 * 4 * blocks  # states of at least 100,000 numbers are in managed memory
    assert 0 <= states("paged_adamw_8bit") - paged <= 2 * 4 * 256
    assert states("lion_8bit") < 0.6 * states("adamw_bnb_8bit")
    assert states("adafactor") < 0.05 * states("adamw_torch")


def test_a_step_holds_the_logits_in_fp32_twice_under_autocast_and_gradients_add_up_to_the_first_step():
    amp, plain = figures(), figures({})
    assert amp["steps"][1] > amp["steps"][0]  # the optimizer's states
    assert plain["loading"] == amp["loading"]
    accumulated = figures(BF16 | {"gradient_accumulation_steps": 3})
    assert accumulated["steps"][0] > amp["steps"][0]  # a backward pass beside the gradients of the one before


def test_checkpointing_and_adapters_need_less():
    full, lora = figures(), figures(peft=LORA)
    again = figures(BF16 | {"gradient_checkpointing": True}, peft=LORA)
    assert max(again["steps"]) < max(lora["steps"]) < max(full["steps"])


def test_quantizing_while_loading_holds_one_unquantized_tensor_at_a_time():
    weights = 2 * (256 * (256 * 2 + 128 * 2) + 3 * 256 * 512)
    rest = 2 * 4096 * 256
    packed = figures(peft=LORA, quantization=NF4)
    assert packed["loading"] < 2 * rest + weights * 0.6 + 2 * 256 * 512 + (1 << 20)
    nested = figures(peft=LORA, quantization=NF4 | {"bnb_4bit_use_double_quant": True})
    assert nested["steps"][0] < packed["steps"][0]
    prepared = figures(peft=LORA, quantization=NF4, kbit={"use_gradient_checkpointing": False})
    assert max(prepared["steps"]) > max(packed["steps"])  # embeddings, norms and head in fp32
    eight = figures(peft=LORA, quantization={"load_in_8bit": True})
    assert max(eight["steps"]) > max(packed["steps"])


def test_rows_are_shuffled_as_the_trainer_shuffles_them_and_padded_to_the_longest_of_a_batch():
    recipe = Recipe("any", lengths=(200, 900, 450, 1024, 70, 600))
    assert [longest for _, longest in shapes_of(recipe)] == [1024, 450, 900]  # by the peaks measured on an H100
    steps = figures(peft=LORA, lengths=(16, 256, 32, 64, 48, 128))["steps"]
    assert len(set(steps)) == 3


def test_rows_of_like_length_come_together_and_the_longest_batch_first():
    lengths = (200, 900, 450, 1024, 70, 600)
    grouped = Recipe("any", {"train_sampling_strategy": "group_by_length"}, lengths=lengths)
    assert [longest for _, longest in shapes_of(grouped)] == [1024, 450, 900]  # so few rows are one group a batch
    in_order = Recipe("any", {"train_sampling_strategy": "sequential"}, lengths=lengths)
    assert [longest for _, longest in shapes_of(in_order)] == [900, 1024, 600]
    histogram = Recipe("any", lengths=tuple(range(1, 1001)))  # more rows than are simulated
    assert next(shapes_of(histogram)) == (2, 1000)


def test_packed_rows_are_one_row_whose_attention_is_told_where_they_begin():
    packed = Recipe("any", packing=True, batch_size=3, lengths=(128, 64))
    assert list(shapes_of(packed)) == [(1, 3 * 128)] * 3
    assert packed.padded and not dataclasses.replace(packed, attention="flash_attention_2").padded
    steps, flash = (
        max(figures(peft=LORA, packing=True, attention=attention)["steps"])
        for attention in ("sdpa", "flash_attention_2")
    )
    assert flash < steps  # no mask of tokens x tokens
    assert flash == max(figures(peft=LORA, attention="flash_attention_2", batch_size=1, lengths=(512,))["steps"])


def test_the_preparation_of_recent_versions_empties_the_cache_after_its_casts(monkeypatch):
    emptied = []
    monkeypatch.setattr("bench.ledger.ledger.Ledger.empty_cache", lambda ledger: emptied.append(len(ledger.events)))
    for versions, kbit in (({}, {}), ({"peft": "0.19.2.dev0"}, {}), ({}, {"auto_clear_cache": False})):
        figures(peft=LORA, quantization=NF4, kbit=kbit | {"use_gradient_checkpointing": False}, versions=versions)
    assert len(emptied) == 1
    figures(BF16 | {"torch_empty_cache_steps": 1}, peft=LORA)
    assert len(emptied) == 1 + 3  # one in each step


def test_what_is_trained_is_cast_where_the_script_does_so():
    adapters, cast = figures(peft=LORA), figures(peft=LORA, trained_dtype="bfloat16")
    assert max(cast["steps"]) < max(adapters["steps"])
    assert figures(trained_dtype="float32")["steps"][0] > figures()["steps"][0]


def test_options_of_the_loss_and_of_offloading_are_simulated():
    peaks = [max(figures(**changes)["steps"]) for changes in ({}, {"loss": "fused"}, {"activation_offloading": True})]
    assert peaks[1] < peaks[0] and peaks[2] < peaks[0]
    assert max(figures(BF16 | {"use_liger_kernel": True})["steps"]) < peaks[1]


def test_code_that_asks_whether_autocast_is_on_is_told_so_and_the_answer_is_taken_back():
    assert not torch.is_autocast_enabled("cuda")
    with MetaAutocast(dtype=torch.float16):
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16
        with MetaAutocast():
            assert torch.get_autocast_dtype("cuda") is torch.bfloat16
        assert torch.get_autocast_dtype("cuda") is torch.float16
    assert not torch.is_autocast_enabled("cuda")


def test_a_recipe_comes_from_json_and_an_unknown_field_is_told():
    row = {"model_id": "opt-125m", "gpu": "NVIDIA H100 80GB HBM3", "recipe": {"name": "any", "lengths": [64, 32]}}
    assert parse(row["recipe"]).lengths == (64, 32)
    assert described(row)["seq_len"] == 64
    found = predict_row(row)
    assert found["allocated"] <= found["reserved"] < found["process"]
    with pytest.raises(QzoError, match="a recipe has no colour; its fields are activation_offloading, arguments, "):
        parse({"name": "any", "colour": "red"})
