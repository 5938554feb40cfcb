"""Layer errors and perplexity against direct computation."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import qzo
from bench.studies.gptq import layer_errors, main, perplexity

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 11, "vocab_size": 50, "hidden_size": 32}


@pytest.fixture(params=[LlamaForCausalLM, OPTForCausalLM])
def model(request):
    torch.manual_seed(0)
    if request.param is LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=32, **HEADS)).eval()
    model = OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=32, **HEADS)).eval()
    for layer in model.model.decoder.layers:
        layer.fc1.bias.data.fill_(3.0)
    return model


def test_errors_are_relative_to_the_product_without_bias(model):
    ids = torch.randint(50, (3, 4, 8))
    low, high = (qzo.quantize(copy.deepcopy(model), bits, 32) for bits in (4, 8))
    errors = layer_errors(model, {"low": low, "high": high}, list(ids))
    last = next(path for path in reversed(errors) if path.endswith(("fc1", "up_proj")))
    assert ".10." in last and ".0." in next(iter(errors))  # numbers in order, not letters
    inputs = []
    handle = model.get_submodule(last).register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    for batch in ids:
        model(batch)
    handle.remove()
    x, weight = torch.cat(inputs), model.get_submodule(last).weight
    for name, other in (("low", low), ("high", high)):
        change = weight - other.get_submodule(last).dequantize()
        expected = (x @ change.t()).pow(2).sum() / (x @ weight.t()).pow(2).sum()
        assert errors[last][name] == pytest.approx(expected.item(), rel=1e-3)
    assert all(error["high"] < error["low"] for error in errors.values())


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(model):
    model.get_output_embeddings().weight.data.zero_()
    assert perplexity(model, list(torch.randint(50, (2, 4, 8)))) == pytest.approx(50, rel=1e-4)
    assert math.isfinite(perplexity(model, [torch.randint(50, (1, 8)), torch.randint(50, (3, 8))]))


def test_a_model_without_weights_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["llama2-7b", "--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out.json").exists()
