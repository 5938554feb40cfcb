"""Measurements read, predicted and compared; what cannot be predicted is a row with its reason and counts as wrong."""

import copy
import json

import pytest

from bench.__main__ import main
from bench.validation import compare as validate
from bench.validation.measurement import MIB, parse, read_rows, source_of
from bench.validation.predict import predict
from qzo.errors import QzoError

# Written for this test in the form of the archive, its numbers made up: a tiny Llama on a T4.
ROW = {
    "model_id": "someone/Tiny-Llama-test",
    "gpu": "Tesla T4",
    "architecture": {
        "hidden_size": 256, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "intermediate_size": 512,
        "vocab_size": 1000, "head_dim": 64, "tie_word_embeddings": True,
    },
    "method": "lora", "base_dtype": "fp16", "quantization": "none", "attention": "eager", "batch_size": 2,
    "seq_len": 64, "lora_rank": 8, "lora_targets": ["q_proj", "v_proj"], "gradient_checkpointing": True,
    "optimizer": "adamw",
    "measured_mib": {"peak_allocated": 30.0, "peak_reserved": 60.0, "process": 200.0, "peak_forward": 25.0},
}  # fmt: skip


def row(**changes) -> dict:
    return copy.deepcopy(ROW) | changes


def write(path, *rows) -> str:
    path.write_text("\n".join(json.dumps(item) for item in rows) + "\n")
    return str(path)


NAMES = {  # a model's id -> what it is taken for, where only the name tells
    "Qwen/Qwen3-9.9B": "qwen3", "Qwen/Qwen-1.8B": "qwen2", "mistralai/Ministral-9B": "ministral",
    "someone/zephyr-7b": "mistral", "google/gemma-3-1b": "gemma3_text", "google/gemma-2-9b": "gemma2",
    "google/gemma-2b-it": "gemma", "microsoft/Phi-3-tiny": "phi3", "microsoft/phi-1_5": "phi",
    "allenai/OLMo-2-1B": "olmo2", "allenai/OLMo-1B": "olmo", "stabilityai/stablelm-base-alpha-3b": "gpt_neox",
    "stabilityai/stablelm-2-1b": "stablelm", "ibm/granite-9b": "granite", "bigcode/starcoder2-3b": "starcoder2",
    "bigcode/gpt_bigcode-santacoder": "gpt_bigcode", "01-ai/Yi-6B-Chat": "llama", "TinyLlama/TinyLlama-9B": "llama",
    "someone/never-heard-of": "llama",
}  # fmt: skip
TARGETS = {"phi3": ["qkv_proj"], "gpt_neox": ["query_key_value"], "gpt_bigcode": ["c_attn"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_for_its_family_and_predicted(name):
    sizes = ROW["architecture"] | {"vocab_size": 50_000}
    assert source_of(name, sizes).config.model_type == NAMES[name]
    targets = TARGETS.get(NAMES[name], ["q_proj", "v_proj"])
    found = predict(parse(row(model_id=name, lora_targets=targets, architecture=sizes)))
    assert 90 * MIB < found["allocated"] < 200 * MIB


def test_a_model_that_is_not_in_the_catalog_needs_its_sizes():
    assert source_of("llama3.2-1b", {}).config.hidden_size == 2048
    with pytest.raises(QzoError, match=r"'TinyLlama/TinyLlama-9B'.*no architecture; give hidden_size"):
        source_of("TinyLlama/TinyLlama-9B", {})


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("attention", ["eager", "sdpa-efficient"])
def test_a_prediction_has_every_metric_and_they_agree_with_each_other(method, attention):
    found = predict(parse(row(method=method, attention=attention)))
    assert found["allocated"] == max(found["forward"], found["backward"], found["step"])
    assert found["allocated"] <= found["reserved"] < found["process"]
    assert found["process"] - found["reserved"] == 140.875 * MIB  # the T4's measured context


def test_eager_attention_needs_more_than_a_kernel_without_a_score_matrix():
    long = {"seq_len": 512}
    eager, efficient = (predict(parse(row(attention=name, **long))) for name in ("eager", "sdpa-efficient"))
    assert eager["backward"] - efficient["backward"] > 2 * 4 * 512 * 512 * 2  # at least one fp16 score matrix


def test_a_known_model_has_the_catalogs_architecture_and_an_unknown_one_its_familys():
    sizes = {"hidden_size": 1536, "num_layers": 28, "vocab_size": 151936}
    assert source_of("Qwen/Qwen2.5-1.5B-Instruct", sizes).config.model_type == "qwen2"
    other = source_of("Qwen/Qwen3-9.9B", {"hidden_size": 640, "num_layers": 3})
    assert (other.config.model_type, other.config.hidden_size, other.config.num_hidden_layers) == ("qwen3", 640, 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "dora"}, "method 'dora'"),
        ({"attention": "ring"}, "attention 'ring'"),
        ({"attention": "sdpa-flash"}, "flash attention needs a GPU of compute capability 8.0 or more"),
        ({"base_dtype": "fp8"}, "base_dtype 'fp8'"),
        ({"optimizer": "lion"}, "optimizer 'lion'"),
        ({"gpu": "Abacus 9"}, "GPU 'Abacus 9'"),
        ({"model_id": "someone/else", "architecture": {}}, "'someone/else' is not in the catalog"),
    ],
)
def test_what_cannot_be_predicted_says_why(changes, reason):
    result = validate.compare_row(row(**changes))
    assert result["status"] == "error" and reason in result["message"] and result["predicted"] is None
    assert validate.verdicts([result]) == {"asked": len(validate.CARDS_GIB), "wrong": len(validate.CARDS_GIB)}


def test_a_row_without_a_key_says_which():
    broken = row()
    del broken["lora_rank"]
    with pytest.raises(QzoError, match="lora_rank"):
        parse(broken)


def test_statistics_are_of_absolute_and_signed_errors():
    results = [{"error_percent": {"allocated": error}} for error in (-1.0, 2.0, -3.0)] + [{"error_percent": None}]
    assert validate.error_statistics(results) == {
        "allocated": {
            "mean_abs_percent": 2.0,
            "median_abs_percent": 2.0,
            "worst_abs_percent": 3.0,
            "mean_signed_percent": pytest.approx(-2 / 3),
        }
    }


def test_a_verdict_is_wrong_where_prediction_and_measurement_fall_on_two_sides_of_a_card():
    gib = 1 << 30
    result = {"measured": {"process": 8 * gib}, "predicted": {"process": 8 * gib + 1}}
    assert validate.verdicts([result]) == {"asked": len(validate.CARDS_GIB), "wrong": 1}
    result["predicted"]["process"] = 7 * gib
    assert validate.verdicts([result]) == {"asked": len(validate.CARDS_GIB), "wrong": 0}


def test_the_command_prints_rows_and_statistics_and_writes_the_contracts_json(tmp_path, capfd):
    source = write(tmp_path / "rows.jsonl", row(), row(gpu="Abacus 9"))
    assert main(["validate", source, "--json", str(tmp_path / "report.json")]) == 1  # a row is not predicted
    shown, told = capfd.readouterr()
    assert told.strip().split("\r") == ["[1/2] predicted", "[2/2] predicted"]  # workers' libraries say nothing
    assert "not predicted: unknown GPU" in shown and "mean, signed" in shown and "verdicts wrong" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["statistics"]) == {"allocated", "reserved", "process", "forward"}
    good = report["rows"][0]
    assert set(good) == {"case", "predicted", "measured", "error_percent", "status", "message"}
    assert good["error_percent"]["allocated"] == 100 * (good["predicted"]["allocated"] / (30 * MIB) - 1)


@pytest.mark.parametrize(
    ("text", "message"), [("", "no measurement"), ("{", "line 1 is not JSON"), ('{"a": 1}', "measured_mib")]
)
def test_a_damaged_file_is_one_line_and_exit_code_two(text, message, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert main(["validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    with pytest.raises(QzoError):
        read_rows(tmp_path / "absent.jsonl")
