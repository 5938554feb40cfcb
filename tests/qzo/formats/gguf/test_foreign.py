"""Architectures that transformers alone reads: what its reader leaves unread is refused, where it matters."""

import numpy as np
import pytest
import torch
from gguf_files import add_tokenizer
from optional import gguf
from transformers import AutoModelForCausalLM, Starcoder2Config

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=None,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write(model, file, theta=10000.0, layers=2, extra=None, **keys):
    writer = gguf.GGUFWriter(file, "starcoder2")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(theta)
    for key, value in keys.items():
        writer.add_float32(f"starcoder2.{key}", value)
    add_tokenizer(writer, 96)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STARCODER2, 2)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    if extra is not None:
        writer.add_tensor(extra, np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF"])
def test_a_file_that_transformers_reads_whole_is_loaded(tmp_path, model, input_ids, suffix):
    file = write(model, tmp_path / f"m{suffix}", logit_scale=1.0)
    with torch.no_grad():
        assert torch.equal(load(file, torch.float32)(input_ids).logits, model(input_ids).logits)
    assert "cannot be trained packed" in inspect(file).reason
    with pytest.raises(QzoError, match=r"cannot be trained packed, only llama, .* load it with dequantize=True"):
        load(file, dequantize=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 999999.0}, "starcoder2.rope.freq_base = 999999.0, is not known here"),
        ({"magic": 1.0}, "starcoder2.magic = 1.0, is not known here"),
        ({"extra": "blk.0.attn_q_norm.weight"}, "has blk.0.attn_q_norm.weight, for which Starcoder2ForCausalLM has no"),
        ({"layers": 1}, "names 1 layers and has tensors of 2"),
        ({"layers": 3}, "names 3 layers and has tensors of 2"),
    ],
)
def test_what_it_leaves_unread_is_refused(tmp_path, model, options, message):
    file = write(model, tmp_path / "m.gguf", **options)
    with pytest.raises(QzoError) as caught:
        load(file)
    assert message in inspect(file).reason
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["olmoe", "deepseek2", "granitemoe", "dbrx", "llama4"])
@pytest.mark.parametrize("dequantize", [True, False])
def test_a_mixture_that_nobody_here_reads_is_told_what_helps(tmp_path, architecture, dequantize):
    """Dequantizing does not: transformers refuses it too."""
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QzoError) as caught:
        load(file, dequantize=dequantize)
    told = f"architecture {architecture} is not supported yet"
    for text in (str(caught.value), inspect(file).reason):
        assert told in text and text.endswith("take the model's safetensors files") and "\n" not in text
