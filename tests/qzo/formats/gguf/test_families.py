"""Gemma, Phi-3 and mixtures of experts, packed: the function of the written model, trained, and written back."""

import pytest
import torch
import transformers
from gguf_files import as_stored, stored_tensors, tiny, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from qzo import QZO, load, scales, trainable
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.load import load_tokenizer
from qzo.formats.gguf.experts import GgufExperts
from qzo.formats.gguf.layer import GgufEmbedding, GgufLinear
from qzo.formats.gguf.tuned import write_gguf as write_back
from qzo.optim.spsa import live_tensors

FAMILIES = {
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 6},
    "gemma3_text": {"head_dim": 32, "sliding_window": 6, "num_hidden_layers": 6},
    "phi3": {"sliding_window": 6},
    "qwen3_moe": {
        **{"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 768, "norm_topk_prob": True},
    },
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
        **{"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral")
READ_BY_TRANSFORMERS = ("gemma2", "gemma3_text", "phi3", "qwen3_moe")  # of qwen2_moe the tokenizer
TIED = ("gemma", "gemma2", "gemma3_text")


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def window(writer):
    writer.add_sliding_window(6)
    writer.add_pad_token_id(0)


def written(tmp_path, family, kind="Q8_0", name="model"):
    """A file and the model that it holds."""
    model = tiny(family, family in TIED, **FAMILIES[family])
    meta = window if "sliding_window" in FAMILIES[family] else lambda writer: writer.add_pad_token_id(0)
    file = write_gguf(model, tmp_path / f"{name}.gguf", kind, meta=meta)
    return file, as_stored(model, file)


def mixed(name):
    """Gate and up of other types, and an expert's stack that is not quantized."""
    return "Q4_1" if "ffn_gate" in name else "F16" if name == "blk.1.ffn_down_exps.weight" else "Q4_0"


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kind", ["Q8_0", mixed], ids=["Q8_0", "mixed"])
def test_packed_and_dequantized_compute_the_written_model(tmp_path, input_ids, family, kind):
    file, model = written(tmp_path, family, kind)
    wanted = logits(model, input_ids)
    packed, dense = load(file, torch.float32, dequantize=False), load(file, torch.float32)
    torch.testing.assert_close(logits(packed, input_ids), wanted)
    torch.testing.assert_close(logits(dense, input_ids), wanted)
    assert type(packed) is type(dense) is type(model) and inspect(file).reason is None
    assert isinstance(packed.model.embed_tokens, GgufEmbedding)
    assert any(isinstance(module, GgufExperts) for module in packed.modules()) == (family in EXPERTS)
    if kind == "Q8_0" and family in READ_BY_TRANSFORMERS:
        options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        part = input_ids[:, :6]  # of Phi-3 they leave the window unread
        torch.testing.assert_close(logits(theirs, part), logits(model, part))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scales_are_trained_and_written_back_where_they_came_from(tmp_path, input_ids, family):
    file, _ = written(tmp_path, family, mixed)
    model = load(file, torch.float32, dequantize=False)
    layers = {path for path, module in model.named_modules() if isinstance(module, GgufLinear)}
    assert {name.removesuffix(".scales") for name in scales(model)} - {"model.embed_tokens"} == layers
    optimizer = QZO(trainable(model, "scales+offsets"), lr=1e-2, eps=1e-2, relative=True)
    before = logits(model, input_ids)
    for _ in range(3):
        optimizer.step(lambda: torch.nn.functional.cross_entropy(model(input_ids).logits[0, :-1], input_ids[0, 1:]))
    assert not torch.equal(logits(model, input_ids), before)
    write_back(file, live_tensors(optimizer), tmp_path / "tuned.gguf")
    again = load(tmp_path / "tuned.gguf", torch.float32, dequantize=False)
    assert torch.equal(logits(again, input_ids), logits(model, input_ids))
    old, new = stored_tensors(file), stored_tensors(tmp_path / "tuned.gguf")
    for name, tensor in old.items():
        n_bytes = {"Q4_0": 18, "Q4_1": 20}.get(tensor.tensor_type.name)
        changed = (tensor.data != new[name].data).reshape(-1, n_bytes or 1)
        assert not changed[:, n_bytes - 16 :].any() if n_bytes else not changed.any(), name


@pytest.mark.skipif(
    hasattr(transformers.integrations.gguf, "GGUF_TOKENIZER_ARCHS"),
    reason="transformers before 5.20 reads tokenizers by its reader of configs",
)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_vocabulary_is_read_for_the_tokenizer_alone(tmp_path, monkeypatch, family):
    """By the tokenizer that transformers takes for the model; its reader of configs, which decodes it too, is not."""
    file, _ = written(tmp_path, family)
    wanted = None
    if family in (*READ_BY_TRANSFORMERS, "mixtral", "qwen2_moe"):
        wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", None)
    found = load_tokenizer(file)
    load(file), load(file, dequantize=False)
    assert found.encode("ab a b w7") == [95, 93, 94] and found.pad_token_id == 0 and found.eos_token_id == 1
    if wanted is not None:
        assert type(found) is type(wanted) and found.padding_side == wanted.padding_side
        assert found.special_tokens_map == wanted.special_tokens_map
        assert found.backend_tokenizer.to_str() == wanted.backend_tokenizer.to_str()


def test_the_layers_of_experts_share_the_bytes_of_their_stacks(tmp_path):
    file, _ = written(tmp_path, "qwen3_moe", "Q4_0")
    model = load(file, dequantize=False)
    stored = sum(tensor.n_bytes for tensor in stored_tensors(file).values() if tensor.tensor_type.name == "Q4_0")
    storages = {
        b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in model.buffers() if b.dtype == torch.uint8
    }
    assert sum(storages.values()) == stored


def test_an_embedding_of_a_gemma_is_scaled_in_the_dtype_of_the_model_and_its_head_is_not(tmp_path, input_ids):
    file, _ = written(tmp_path, "gemma3_text", "Q4_0")
    packed, dense = load(file, dequantize=False), load(file)
    assert packed.dtype == dense.dtype == torch.bfloat16
    embed = [model.model.embed_tokens(input_ids) for model in (packed, dense)]
    assert torch.equal(*embed) and embed[0].dtype == torch.bfloat16
    torch.testing.assert_close(packed.lm_head(embed[0]), dense.lm_head(embed[1]), rtol=0.05, atol=0.1)
