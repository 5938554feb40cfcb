"""Rows of others, read as recipes."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from bench.cases import gpus
from bench.ledger.ledger import Ledger
from bench.validation.compare import compare_row
from bench.validation.frameworks.mezo import answer, bound_scores, score_answers
from bench.validation.frameworks.transformers_4 import repeat_keys, shift
from bench.validation.measurement import MIB, measured_bytes
from bench.validation.published import zeroth_order
from bench.validation.published.peft_comparison import AROUND, LONGEST
from bench.validation.published.qwen import drawn_lengths
from bench.validation.published.readers import predictor_of, read, unstated
from bench.validation.published.zeroth_order import EVALUATED
from qzo.errors import QzoError

SIZES = {
    "hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "intermediate_size": 256,
    "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
COMPARED = {
    "source": {"repo": "huggingface/peft"}, "experiment": "lora/rank32", "model_id": "meta-llama/Llama-9-tiny",
    "gpu": "NVIDIA L40S", "architecture": SIZES, "base_dtype": "bf16", "batch_size": 4, "max_seq_len": 768,
    "use_cache": True, "optimizer": "adamw", "gradient_checkpointing": False,
    "peft_config": {"peft_type": "LORA", "r": 32, "target_modules": ["q_proj", "v_proj"]},
    "measured_mib": {"peak_reserved": 300.0},
}  # fmt: skip
GROWN = SIZES | {"vocab_size": SIZES["vocab_size"] - 1}  # by a token for padding, which Mistral lacks
TRAINED = {
    "source": {"repo": "foundation-model-stack/fms-acceleration"}, "model_id": "mistralai/Mistral-9-tiny",
    "gpu": "NVIDIA A100 80GB", "architecture": GROWN, "method": "qlora", "base_dtype": "bf16", "quantization": "nf4",
    "kbit_preparation": True, "autocast": True, "batch_size": 2, "seq_len": 64, "lora_rank": 16, "lora_dropout": 0.1,
    "lora_targets": ["q_proj", "v_proj"], "gradient_checkpointing": True, "optimizer": "adamw (torch, foreach)",
    "measured_mib": {"peak_allocated": 100.0},
}  # fmt: skip


def test_a_row_of_pefts_comparison_is_a_loop_of_its_own_on_the_longest_batch():
    recipe = read(COMPARED).recipe
    assert (recipe.loop, recipe.use_cache, recipe.masked, recipe.peft_class) == ("plain", True, True, "LoraConfig")
    assert recipe.lengths == (AROUND[0],) * 4 + (LONGEST[768],) * 4 + (AROUND[1],) * 4
    assert read(COMPARED | {"peft_config": {}}).recipe.peft is None  # all weights


def test_lora_fa_trains_the_second_matrix_alone():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2), "lora_B": torch.nn.Linear(2, 2)})
    for change in read(COMPARED | {"optimizer": "lora-fa"}).changes:
        change(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "lora_B.weight", "lora_B.bias",
    }  # fmt: skip


def test_what_a_source_does_not_state_is_told():
    assert unstated(COMPARED) is None and unstated(SIZES) is None  # the archive of the T4 has no source
    for repository, part in (("QwenLM/Qwen", "measured by"), ("modelscope/ms-swift", "lengths"), (None, "card")):
        assert part in unstated(COMPARED | {"source": {"repo": repository}})


def test_a_method_that_pefts_versions_name_or_compute_otherwise_is_told_apart():
    assert read(COMPARED | {"peft_config": {"peft_type": "BONE", "r": 8}}).recipe.peft_class == "MissConfig"
    turned = COMPARED | {"peft_config": {"peft_type": "OFT", "r": 32}}
    assert read(turned).recipe.peft["oft_block_size"] == 0
    with pytest.raises(QzoError, match=r"another computation since PEFT 0\.16"):
        read(turned | {"versions": {"peft": "0.15.2.dev0"}})


def test_a_row_of_the_trainer_says_autocast_preparation_and_quantization():
    recipe = read(TRAINED).recipe
    assert recipe.arguments == {
        "optim": "adamw_torch", "bf16": True, "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }  # fmt: skip
    assert recipe.quantization["bnb_4bit_use_double_quant"] and recipe.kbit is not None
    assert recipe.peft["lora_dropout"] == 0.1 and recipe.lengths == (64,)
    assert read(TRAINED | {"method": "full-finetuning", "quantization": "none"}).recipe.peft is None


QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = TRAINED | {"fused_kernels": True, "lora_targets": QKVO, "kbit_preparation": False}
OLD = {"versions": {"transformers": "4.48.1"}}
ROWS = {
    "peft": COMPARED,
    "trainer": TRAINED | OLD,
    "fused": FUSED | OLD | {"framework_config": "accelerated-peft-bnb-foak"},
    "liger": FUSED | {"framework_config": "accelerated-peft-bnb-foak-liger", "liger": True},
    "gptq": FUSED | {"quantization": "gptq-4bit", "base_dtype": "fp16", "framework_config": "autogptq-foak"},
}


@pytest.fixture(scope="module")
def allocated():
    pytest.importorskip("bitsandbytes")
    results = {name: compare_row(row) for name, row in ROWS.items()}
    assert all(result["status"] == "ok" and result["error_percent"] for result in results.values()), results
    return {name: result["predicted"]["allocated"] for name, result in results.items()}


def test_fused_kernels_hold_fewer_logits_than_transformers_did_and_a_fused_head_none(allocated):
    logits = 2 * 64 * SIZES["vocab_size"]  # elements
    assert allocated["trainer"] - allocated["fused"] > 3 * logits
    assert allocated["fused"] - allocated["liger"] > 2 * logits


def test_a_packed_row_is_as_long_as_the_models_positions_allow():
    quotient = "train_tokens_per_second / train_samples_per_second = "
    for counted, tokens in ((2047.9, 2048), (4093.5, 4096)):
        row = TRAINED | {"seq_len": 4096, "seq_len_from": f"{quotient}{counted}"}
        assert read(row).recipe.lengths == (tokens,)


def test_the_vocabulary_grows_by_the_special_tokens_that_a_tokenizer_lacks():
    for model, added in (("meta-llama/Meta-Llama-3-8B", 2), ("mistralai/Mistral-9-tiny", 1), ("ibm/PowerLM-tiny", 0)):
        published = read(TRAINED | {"model_id": model})
        assert published.source.config.vocab_size == GROWN["vocab_size"] + added
        assert published.sampled  # nvidia-smi, once a second


def test_the_gradient_of_cut_logits_is_copied_once_on_its_way_back():
    ledger = Ledger("meta")
    logits = torch.empty(2, 8, 16, device="meta", requires_grad=True)
    with ledger:
        cut, _ = shift(logits, torch.empty(2, 8, dtype=torch.long, device="meta"), 16)
        cut.backward(torch.empty(14, 16, device="meta"))
    born = [event.block.nbytes for event in ledger.events if event.sign > 0]
    assert logits.grad.shape == (2, 8, 16)
    assert born.count(14 * 16 * 4) == 3  # cut, its gradient as it comes, and the copy
    assert born.count(16 * 16 * 4) == 2  # the whole and its gradient


def test_what_nvidia_smi_says_is_the_process():
    assert measured_bytes({"measured_mib": {"process_nvidia_smi": 3.0}}) == {"process": 3 * MIB}


@pytest.mark.parametrize(
    ("row", "change", "reason"),
    [
        (COMPARED, {"optimizer": "lion"}, "the optimizer lion is not known"),
        (COMPARED, {"max_seq_len": 512}, "longest batch of rows cut at 512 tokens"),
        (COMPARED, {"peft_config": {"peft_type": "SHIRA"}}, "looks for its indices in a mask"),
        (TRAINED, {"compile": True}, "the compiler's choice"),
        (COMPARED, {"peft_config": {"peft_type": "NEW"}}, "the PEFT method NEW is not in the installed version"),
        (TRAINED, {"quantization": "gptq-3bit"}, "training on gptq-3bit"),
        (TRAINED, {"framework": "torchtune"}, "how torchtune runs a step"),
    ],
)
def test_what_no_recipe_says_is_told_and_not_predicted_as_something_else(row, change, reason):
    with pytest.raises(QzoError, match=reason):
        read(row | change)
    assert compare_row(row | change)["status"] == "error"


QWEN = TRAINED | {"source": {"repo": "QwenLM/Qwen"}, "model_id": "Qwen/Qwen-9-tiny", "quantization": "none"}


def test_the_first_qwens_names_are_those_of_qwen2():
    recipe = read(QWEN | {"lora_targets": ["c_attn", "c_proj"], "modules_to_save": ["wte"]}).recipe
    assert recipe.peft["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    assert recipe.peft["modules_to_save"] == ["embed_tokens"]
    with pytest.raises(QzoError, match="which stage of DeepSpeed"):
        read(QWEN | {"method": "full"})


def test_drawn_lengths_rise_to_the_longest_that_is_allowed():
    lengths = drawn_lengths(2048, 2)
    assert lengths == tuple(sorted(lengths)) and lengths[-2:] == (2048, 2048) and len(lengths) == 18
    assert 250 < lengths[0] < lengths[-3] < 2048


OPT = {
    "source": {"repo": "liangyuwang/zo2"}, "model_id": "facebook/opt-tiny", "gpu": "NVIDIA GeForce RTX 3090",
    "architecture": SIZES | {"num_layers": 6, "num_kv_heads": 4, "tie_word_embeddings": False},
    "method": "mezo, layers streamed from CPU memory (ZO2)", "attention": "sdpa-flash", "batch_size": 1, "seq_len": 64,
    "measured_mib": {"process": 500.0},
}  # fmt: skip


def test_streamed_layers_take_two_layers_room_however_many_there_are():
    few, many = (
        compare_row(OPT | {"architecture": OPT["architecture"] | {"num_layers": layers}})["predicted"]
        for layers in (3, 9)
    )
    assert few["reserved"] == many["reserved"]


def test_nvml_counts_what_the_driver_keeps_and_nvidia_smi_does_not():
    gpu, resident = gpus.get("rtx-3090"), OPT | {"method": "mezo"}
    kept = gpu.driver_reserved_bytes
    for row, more in (
        (OPT, kept),
        (resident, kept),
        (resident | {"seq_len": None}, 0),
    ):  # MeZO's figure tells no length
        found = compare_row(row)["predicted"]
        assert found["process"] == found["reserved"] + gpu.context_bytes(backward=False) + more
    assert kept > 0 and gpus.get("rtx-4060").driver_reserved_bytes == 0


def test_mezos_figure_counts_in_gib_and_what_ran_on_several_gpus_is_not_said():
    row = OPT | {"source": {"repo": "princeton-nlp/MeZO"}, "method": "zero-shot", "attention": "eager", "seq_len": None}
    found = compare_row(row | {"measured_mib": {"memory_as_printed": 1e9 / MIB}})
    assert found["status"] == "ok" and found["measured"] == {"process": 1 << 30}
    assert found["rounding"] == 1 << 29 and "rounding" not in compare_row(OPT)
    assert "the sum over 4 GPUs" in compare_row(row | {"gpus": 4})["message"]


def test_an_allocator_keeps_what_each_longer_prompt_needed():
    architecture = OPT["architecture"] | {"vocab_size": 50272}
    row = OPT | {"architecture": architecture, "method": "zero-shot", "seq_len": None, "gpu": "NVIDIA A100 80GB"}
    all_of_them, longest = (zeroth_order._forward(row, lengths) for lengths in (EVALUATED, EVALUATED[-1:]))
    assert all_of_them["allocated"] == longest["allocated"] and all_of_them["reserved"] > longest["reserved"]


def test_keys_are_repeated_within_an_attention_alone():
    from transformers.integrations import sdpa_attention

    class SomeAttention(torch.nn.Module):
        def forward(self) -> bool:
            return sdpa_attention.use_gqa_in_sdpa(None, None, None)

    model, before = torch.nn.Sequential(SomeAttention()), sdpa_attention.use_gqa_in_sdpa
    repeat_keys(model)
    assert model[0].forward() is False and sdpa_attention.use_gqa_in_sdpa is before


def test_mezos_adam_scores_two_answers_with_the_attention_of_its_day():
    row = OPT | {"source": {"repo": "princeton-nlp/MeZO"}, "method": "prefix-tuning (Adam)", "attention": "eager"}
    said = read(row)
    assert predictor_of(row) is None and said.recipe.autocast == "float16" and said.recipe.batch_size == 2
    with pytest.raises(QzoError, match="the sum over 4 GPUs"):
        predictor_of(row | {"gpus": 4})
    model = OPTForCausalLM(OPTConfig(
        vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, attn_implementation="eager",
    )).eval()  # fmt: skip
    ids, mask = torch.arange(2, 18).view(2, 8), torch.ones(2, 8, dtype=torch.long)
    logits = model(input_ids=ids, attention_mask=mask).logits
    bound_scores(model)
    assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits, logits, atol=1e-6)
    tokens = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert torch.allclose(answer(model, ids[:1]), tokens[0], atol=1e-6)
    score_answers(model)
    picked = tokens.mean(-1)
    loss = model(input_ids=ids, attention_mask=mask)["loss"]
    assert torch.allclose(loss, -picked.log_softmax(0)[0], atol=1e-6)
