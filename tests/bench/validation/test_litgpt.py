"""LitGPT's rows: its own model, its adapters, and the 4-bit products of bitsandbytes 0.41."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from bench.validation.compare import compare_row
from bench.validation.frameworks.bitsandbytes_041 import MatMul4Bit
from bench.validation.frameworks.litgpt.model import HEAD_CHUNK, Gpt, only_adapters
from bench.validation.frameworks.litgpt.shape import Shape
from bench.validation.published.readers import read

VOCABULARY, TOKENS = 4096, 2 * 300
ROW = {
    "framework": "litgpt", "model_id": "meta-llama/Llama-9-tiny", "gpu": "NVIDIA A10G", "method": "qlora",
    "architecture": {
        "hidden_size": 128, "num_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2, "head_dim": 32,
        "intermediate_size": 256, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
    },
    "base_dtype": "bf16", "quantization": "nf4", "batch_size": 2, "seq_len": 300, "lora_rank": 8, "lora_dropout": 0.05,
    "lora_targets": ["q_proj", "v_proj"], "optimizer": "paged-adamw (bitsandbytes)", "config": "tiny/qlora",
    "measured_mib": {"peak_allocated": 20.0},
}  # fmt: skip
LORA = {"method": "lora", "quantization": "none", "optimizer": "adamw"}
PROMPTED = ROW | {"method": "adapter", "lora_rank": None, "lora_targets": None, "lora_dropout": None}
STABLELM = Shape(16, 4096, 32, 32, 128, 16384, 50688, gated=False, rms=False, parallel=True, bias=True, rotated=0.25)


@pytest.fixture(scope="module")
def allocated():
    pytest.importorskip("bitsandbytes")
    rows = {
        "qlora": ROW, "tables": {name: value for name, value in ROW.items() if name != "config"}, "adapter": PROMPTED,
        "adapter-v2": PROMPTED | {"method": "adapter-v2"},
        "gemma": ROW | LORA | {"model_id": "google/gemma-2-9-tiny"},
    }  # fmt: skip
    found = {name: compare_row(row) for name, row in rows.items()}
    assert all(result["status"] == "ok" for result in found.values()), found
    return {name: result["predicted"]["allocated"] for name, result in found.items()}


def test_litgpts_logits_are_in_fp32_and_so_are_their_probabilities(allocated):
    assert min(allocated.values()) > 2 * 4 * TOKENS * VOCABULARY


def test_a_full_batch_after_a_full_batch_holds_the_inputs_of_both(allocated):
    inputs = 2 * TOKENS * (128 + 128 + 128 + 128 + 256)  # bytes a layer: of qkv, proj, fc_1 and fc_2 (one), proj
    assert allocated["qlora"] - allocated["tables"] > 2 * inputs


def test_adapter_v2_holds_the_results_of_all_layers_too(allocated):
    assert allocated["adapter-v2"] > allocated["adapter"]


@pytest.mark.parametrize(("prompt", "published"), [("adapter", 573_888), ("adapter-v2", 2_125_248)])
def test_what_an_adapter_trains_is_as_many_parameters_as_litgpt_tells_of_stablelm(prompt, published):
    model = Gpt(Shape(**{**vars(STABLELM), "prompt": prompt}), torch.bfloat16)
    only_adapters(model)
    assert sum(item.numel() for item in model.parameters() if item.requires_grad) == published


def test_all_of_litgpts_linear_layers_are_quantized_the_head_too():
    model = read(ROW).build(torch.bfloat16)
    assert model.get_output_embeddings() is None
    assert list(model.named_parameters())[-1][0] == "ln_f.weight"  # what transformers would leave out


def test_a_last_token_that_is_a_chunk_by_itself_has_no_loss():
    model = Gpt(Shape(1, 32, 2, 2, 16, 64, 64, rank=2, lora=("query",)), torch.bfloat16)
    ids = torch.zeros(1, HEAD_CHUNK + 1, dtype=torch.long, device="meta")
    assert model(ids, ids).loss.shape == () and [part.shape[1] for part in model.logits] == [HEAD_CHUNK, 1]


def test_what_went_into_a_4_bit_product_of_old_lives_as_long_as_the_loss():
    state = SimpleNamespace(shape=(3, 4), dtype=torch.float16, nested=False)
    x = torch.ones(2, 4, requires_grad=True) * 1.0
    loss = MatMul4Bit.apply(x, state, None).sum()
    held = weakref.ref(x)
    del x
    loss.backward()
    assert held() is not None
    del loss
    assert held() is None


def test_weights_and_moments_of_more_bytes_than_the_row_are_refused():
    whole = ROW | {"method": "ft-bf16", "lora_targets": None, "measured_mib": {"peak_allocated": 1.0}}
    assert compare_row(whole)["message"] == "the row has fewer bytes than its weights, gradients and AdamW's moments"
