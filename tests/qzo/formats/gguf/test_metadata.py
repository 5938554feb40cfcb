"""What a GGUF file says of its model is computed, packed and dequantized alike, or refused: nothing is left unread."""

import math

import numpy as np
import pytest
import torch
from gguf_files import as_stored, tiny, write_gguf
from optional import gguf

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect


def logits(model, length=24):
    input_ids = torch.randint(5, 96, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids).logits


def check(file, reference, length=24):
    """Loading the file gives the reference's logits in both ways, and inspect has nothing against it."""
    wanted = logits(reference, length)
    for dequantize in (False, True):
        torch.testing.assert_close(logits(load(file, torch.float32, dequantize=dequantize), length), wanted)
    assert inspect(file).reason is None


def rope(kind, theta=10000.0, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


def llama3_factors(base, dims, factor, original):
    """As llama.cpp's converter writes them."""
    factors = []
    for i in range(dims // 2):
        length = 2 * math.pi * base ** (2 * i / dims)
        smooth = (original / length - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else 0.0
        factors.append(1.0 if smooth >= 1 else factor if smooth <= 0 else between)
    return np.array(factors, np.float32)


def scaling(kind, factor=None, original=None, **more):
    """Adds rope.scaling keys; `more` are further ones of the architecture, with _ for the dot after `rope`."""

    def add(writer):
        arch = writer.arch
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind])
        if factor is not None:
            writer.add_rope_scaling_factor(factor)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)
        for name, value in more.items():
            writer.add_float32(f"{arch}.rope.scaling.{name}", value)

    return add


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
NAMED = {  # what the file has more -> what transformers calls it
    "linear": (scaling("LINEAR", 4.0), None, rope("linear", factor=4.0)),
    "old linear": (lambda w: w.add_float32("llama.rope.scale_linear", 4.0), None, rope("linear", factor=4.0)),
    "none": (scaling("NONE", 4.0), None, rope("default")),
    "base": (lambda w: w.add_rope_freq_base(500.0), None, rope("default", 500.0)),
    "yarn": (scaling("YARN", 4.0, 16), None, rope("yarn", **YARN)),
    "yarn betas": (
        scaling("YARN", 4.0, 16, yarn_beta_fast=2.0, yarn_beta_slow=0.5, yarn_ext_factor=1.0),
        None,
        rope("yarn", **YARN, beta_fast=2.0, beta_slow=0.5),
    ),
    "yarn attention": (
        scaling("YARN", 4.0, 16, attn_factor=0.5),
        None,
        rope("yarn", **YARN, attention_factor=0.5 * (1 + 0.1 * math.log(4))),
    ),
    "llama3": (
        lambda w: w.add_rope_freq_base(500000.0),
        {"rope_freqs.weight": llama3_factors(500000.0, 16, 8.0, 32)},
        rope(
            *("llama3", 500000.0), factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(NAMED))
def test_rope_scaling_gets_its_name_in_transformers(tmp_path, case):
    meta, extra, options = NAMED[case]
    model = tiny(**options)
    file = write_gguf(model, tmp_path / "m.gguf", "Q8_0", extra, meta=meta)
    check(file, as_stored(model, file))
    assert load(file).config.rope_parameters["rope_type"] == options["rope_parameters"]["rope_type"]


def turned(model, divisors, attention=1.0):
    rotary = model.model.rotary_emb
    rotary.inv_freq.div_(torch.tensor(divisors, dtype=torch.float32))
    rotary.attention_scaling = attention
    return model


def test_rope_without_a_name_is_turned_as_llama_cpp_does(tmp_path):
    """Factors of no formula, YaRN by half, an attention factor beside linear scaling: a longrope of equal factors."""
    free = np.linspace(1.0, 7.5, 8).astype(np.float32)
    half = [1 / (share * 0.5 + (1 - share * 0.5) / 4) for share in (1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0)]  # pairs 0 to 5
    cases = {
        "free": ({"extra": {"rope_freqs.weight": free}}, free.tolist(), 1.0),
        "linear": ({"meta": scaling("LINEAR", 4.0, attn_factor=1.25)}, [4.0] * 8, 1.25),
        "both": ({"meta": scaling("LINEAR", 2.0), "extra": {"rope_freqs.weight": free}}, (2 * free).tolist(), 1.0),
        "half": (
            {"meta": scaling("YARN", 4.0, 1000, yarn_ext_factor=0.5, yarn_beta_fast=100.0, yarn_beta_slow=0.6)},
            half,
            1 + 0.1 * math.log(4),
        ),
    }
    for name, (options, divisors, attention) in cases.items():
        model = tiny(seed=1, rope_parameters=None)
        file = write_gguf(model, tmp_path / f"{name}.gguf", "Q8_0", **options)
        check(file, turned(as_stored(model, file), divisors, attention))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_longrope_takes_short_factors_and_beyond_the_original_length_long_ones(tmp_path, family):
    """With part of a head turned in Phi-3, whose converter writes the attention factor."""
    dims = 12 if family == "phi3" else 16
    short, long = np.linspace(1.0, 1.5, dims // 2), np.linspace(2.0, 9.0, dims // 2)
    options = rope(
        "longrope", short_factor=short.tolist(), long_factor=long.tolist(), attention_factor=1.1875,
        original_max_position_embeddings=16, **({"partial_rotary_factor": 0.75} if family == "phi3" else {}),
    )  # fmt: skip
    options |= {"original_max_position_embeddings": 16} if family == "phi3" else {}
    model = tiny(family, **options)
    parts = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}

    def meta(writer):
        writer.add_rope_dimension_count(dims)
        scaling("LONGROPE", None, 16, attn_factor=1.1875)(writer)

    extra = {name: values.astype(np.float32) for name, values in parts.items()}
    file = write_gguf(model, tmp_path / "m.gguf", "Q8_0", extra, meta=meta)
    reference = as_stored(model, file)
    for length in (12, 24):
        check(file, reference, length)
    without = write_gguf(model, tmp_path / "w.gguf", "Q8_0", extra, meta=lambda w: scaling("LONGROPE", None, 16)(w))
    if family == "llama":
        wanted = math.sqrt(1 + math.log(64 / 16) / math.log(16))
        assert load(without).config.rope_parameters["attention_factor"] == pytest.approx(wanted)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_the_length_of_a_head_is_that_of_the_file(tmp_path, family):
    model = tiny(family, head_dim=32)
    file = write_gguf(model, tmp_path / "m.gguf", "Q8_0", meta=None if family == "qwen3" else key_length(32))
    check(file, as_stored(model, file))


def key_length(length):
    def add(writer):
        writer.add_key_length(length)
        writer.add_value_length(length)
        writer.add_rope_dimension_count(length)

    return add


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_biases_are_added_and_those_that_a_file_lacks_are_0(tmp_path, family):
    options = {"attention_bias": True} | ({"mlp_bias": True} if family == "llama" else {})
    model = tiny(family, head_dim=16, **options)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    for name, without in (("all", None), ("some", "attn_output.bias")):
        file = write_gguf(model, tmp_path / f"{name}.gguf", "Q8_0", without=without)
        check(file, as_stored(model, file))
    file = write_gguf(model, tmp_path / "torn.gguf", "Q8_0", without="blk.1.attn_output.bias")
    for dequantize in (True, False):
        with pytest.raises(QzoError, match=r"has no tensor blk\.1\.attn_output\.bias"):
            load(file, dequantize=dequantize)


@pytest.mark.parametrize("dequantize", [True, False])
def test_a_tensor_without_a_place_is_told(tmp_path, dequantize):
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    file = write_gguf(tiny("qwen3"), tmp_path / "m.gguf", "Q8_0", extra)
    with pytest.raises(QzoError, match=r"has blk\.0\.attn_sinks\.weight, for which Qwen3ForCausalLM has no place"):
        load(file, dequantize=dequantize)
    assert "has blk.0.attn_sinks.weight, for which" in inspect(file).reason


def test_a_llama_with_a_window_is_a_mistral_and_one_with_experts_a_mixtral(tmp_path):
    for family, options in (
        ("mistral", {"sliding_window": 8}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    ):
        model = tiny(family, **options)
        file = write_gguf(
            model, tmp_path / f"{family}.gguf", "Q8_0",
            meta=lambda w, options=options: w.add_sliding_window(options["sliding_window"] or 0),
        )  # fmt: skip
        check(file, as_stored(model, file))
        assert type(load(file, dequantize=False)) is type(model)


GEMMA2 = {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}


def test_gemma_2_caps_and_scales_as_the_file_says(tmp_path):
    def meta(writer):
        writer.add_sliding_window(8)
        writer.add_attn_logit_softcapping(2.0)
        writer.add_final_logit_softcapping(3.0)
        writer.add_attention_scale(20**-0.5)

    model = tiny("gemma2", query_pre_attn_scalar=20, **GEMMA2)
    file = write_gguf(model, tmp_path / "m.gguf", "Q8_0", meta=meta)
    check(file, as_stored(model, file))


@pytest.mark.parametrize("pattern", [6, 2, [True, False, False, True]])
def test_gemma_3_turns_layers_with_a_window_by_a_base_of_their_own(tmp_path, pattern):
    """A scaling is that of the other layers."""
    is_list = isinstance(pattern, list)
    local = pattern if is_list else [(i + 1) % pattern != 0 for i in range(4)]
    types = ["sliding_attention" if one else "full_attention" for one in local]
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }

    def meta(writer):
        writer.add_sliding_window(8)
        writer.add_rope_freq_base(5000.0)
        writer.add_float32("gemma3.rope.freq_base_swa", 100.0)
        scaling("LINEAR", 8.0)(writer)
        if pattern != 6:
            (writer.add_array if is_list else writer.add_uint32)("gemma3.attention.sliding_window_pattern", pattern)

    model = tiny(
        "gemma3_text", num_hidden_layers=4, layer_types=types, sliding_window=8, rope_parameters=parameters,
        query_pre_attn_scalar=256,
    )  # fmt: skip
    file = write_gguf(model, tmp_path / "m.gguf", "Q8_0", meta=meta)
    check(file, as_stored(model, file))


def u32(name, value):
    return lambda writer: writer.add_uint32(f"{writer.arch}.{name}", value)


def f32(name, value):
    return lambda writer: writer.add_float32(f"{writer.arch}.{name}", value)


REFUSED = {  # family, what the file has more, what is told
    "unknown": ("llama", f32("attention.magic", 1.0), "llama.attention.magic = 1.0, is not known here"),
    "unknown neutral": ("llama", f32("attention.magic", 0.0), "llama.attention.magic = 0.0, is not known here"),
    "softcap": ("llama", f32("attn_logit_softcapping", 30.0), "llama.attn_logit_softcapping = 30.0"),
    "softcap of gemma 3": ("gemma3_text", f32("attn_logit_softcapping", 30.0), "gemma3.attn_logit_softcapping"),
    "embedding scale": ("llama", f32("embedding_scale", 12.0), "llama.embedding_scale = 12.0"),
    "logit scale": ("qwen2", f32("logit_scale", 0.5), "qwen2.logit_scale = 0.5"),
    "residual scale": ("qwen3", f32("residual_scale", 0.5), "qwen3.residual_scale = 0.5"),
    "attention scale": ("llama", f32("attention.scale", 0.5), "llama.attention.scale = 0.5, and only 0.25"),
    "value length": ("llama", u32("attention.value_length", 8), "llama.attention.value_length = 8, and only 16"),
    "part of a head": ("qwen2", u32("rope.dimension_count", 8), "qwen2.rope.dimension_count = 8, and only 16"),
    "not causal": ("llama", lambda w: w.add_causal_attention(False), "llama.attention.causal = False"),
    "kind of scaling": ("llama", lambda w: w.add_string("llama.rope.scaling.type", "ntk"), "scaling.type = 'ntk'"),
    "whole factor of yarn": ("llama", scaling("YARN", 4.0, 16, yarn_attn_factor=1.0), "yarn_attn_factor = 1.0, and"),
    "multiplier of yarn": ("llama", scaling("YARN", 4.0, 16, yarn_log_multiplier=0.1), "yarn_log_multiplier"),
    "longrope": ("llama", scaling("LONGROPE", None, 16), "has no rope_factors_long.weight"),
    "experts": ("qwen2", u32("expert_count", 4), "qwen2.expert_count = 4"),
    "normed routing": ("qwen2_moe", lambda w: w.add_expert_weights_norm(True), "qwen2moe.expert_weights_norm = True"),
    "window of some": ("qwen2", u32("attention.sliding_window", 8), "does not tell of which layers"),
    "heads by layer": (
        "llama",
        lambda w: w.add_array("llama.feed_forward_length_", [1, 2]),
        "llama.feed_forward_length_ = [1, 2], is not known here",
    ),
    "predicted tokens": ("qwen3", u32("nextn_predict_layers", 1), "qwen3.nextn_predict_layers = 1"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_understood_is_refused_by_load_and_inspect_alike(tmp_path, case):
    family, meta, message = REFUSED[case]
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    model = tiny(family, head_dim=16, **(sizes if family == "qwen2_moe" else {}))
    file = write_gguf(model, tmp_path / "m.gguf", "Q8_0", meta=meta)
    told = set()
    for dequantize in (False, True):
        with pytest.raises(QzoError) as caught:
            load(file, dequantize=dequantize)
        told.add(str(caught.value).removeprefix(f"{file}").removeprefix(": "))
    reason = inspect(file).reason
    assert message in reason and len(told) == 1 and reason.removeprefix(f"{file}") in told
    assert reason.endswith(("; take the model's safetensors files", "it: take the model's safetensors files", "again"))


def test_keys_that_change_nothing_are_no_obstacle(tmp_path):
    def meta(writer):
        writer.add_string("quantize.imatrix.file", "x")
        writer.add_string("someone.of.the.web", "x")
        writer.add_string("llama.tensor_data_layout", "Meta AI original pth")
        writer.add_causal_attention(True)
        for key in ("logit_scale", "embedding_scale", "expert_weights_scale", "rope.scaling.attn_factor"):
            writer.add_float32(f"llama.{key}", 1.0)
        writer.add_uint32("llama.attention.sliding_window", 64)
        writer.add_uint32("llama.expert_used_count", 0)
        writer.add_float32("llama.attention.scale", 0.25)
        writer.add_array("llama.attention.value_length_swa", [16, 16])

    model = tiny()
    ones = np.ones(8, np.float32)
    extra = {"rope_freqs.weight": ones, "blk.0.attn_rot_embd.weight": ones}
    file = write_gguf(model, tmp_path / "m.gguf", "Q8_0", extra, meta=meta)
    check(file, as_stored(model, file))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dequantize", [True, False])
def test_fewer_or_more_layers_than_in_the_file_are_told(tmp_path, count, dequantize):
    file = write_gguf(tiny(), tmp_path / "m.gguf", "Q8_0", layers=count)
    with pytest.raises(QzoError, match=f"names {count} layers and has tensors of 2"):
        load(file, dequantize=dequantize)
    assert f"names {count} layers and has tensors of 2" in inspect(file).reason


@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight"])
@pytest.mark.parametrize("values", [[1.0] * 4, [0.0] * 8, [math.inf] * 8])
def test_factors_that_cannot_be_are_told(tmp_path, name, values):
    file = write_gguf(tiny(), tmp_path / "m.gguf", "Q8_0", {name: np.array(values, np.float32)})
    with pytest.raises(QzoError, match=f"{name} has {len(values)} factors; need 8 positive"):
        load(file)


@pytest.mark.parametrize("dequantize", [True, False])
def test_a_text_ends_where_the_file_says(tmp_path, dequantize):
    def meta(writer):
        writer.add_eot_token_id(7)

    model = load(write_gguf(tiny(), tmp_path / "m.gguf", "Q8_0", meta=meta), dequantize=dequantize)
    assert model.generation_config.eos_token_id == [1, 7] and model.config.eos_token_id == 1
    assert model.config.bos_token_id == 0 and model.config.pad_token_id is None
