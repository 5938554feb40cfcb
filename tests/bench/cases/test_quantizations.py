"""`--quantization`: the bytes of every format, the simulated CPU against the measured one, and what names are told."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig

from bench.__main__ import main
from bench.cases.case import BenchCase
from bench.cases.models import build_empty, resolve
from bench.cases.quantizations import FORMATS, named, quantize_as
from bench.validation.recorded import simulated_case
from bench.worlds import cpu, sim, sim_cpu
from qzo.errors import QzoError
from qzo.live.scales import quantized_bytes

TOLERANCE = 0.002
FOLLOWING = ("gguf-q4_1", "gguf-q5_1", "torchao-int4")  # formats with offsets, which move with their scales
NEEDS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "gguf": "gguf", "hqq": "hqq", "torchao": "torchao"}
WEIGHTS = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576
# codes, scales, zero points or offsets, and tables, of one such layer of Llama, by the layout of each format
GROUPS_64, GROUPS_32, ROWS = WEIGHTS // 64, WEIGHTS // 32, 2 * 576 + 2 * 192 + 2 * 1536 + 576
BYTES = {
    "awq": WEIGHTS // 2 + GROUPS_64 * 2 + GROUPS_64 // 2,
    "nf4": WEIGHTS // 2 + GROUPS_64 * 4 + 7 * 16 * 4,
    "int8": WEIGHTS + ROWS * 4,
    "gguf-q4_0": GROUPS_32 * 18,
    "gguf-q4_1": GROUPS_32 * 20,
    "gguf-q5_0": GROUPS_32 * 22,
    "gguf-q5_1": GROUPS_32 * 24,
    "gguf-q8_0": GROUPS_32 * 34,
    "hqq-2": WEIGHTS // 4 + GROUPS_64 * 4,
    "hqq-8": WEIGHTS + GROUPS_64 * 4,
    "aqlm-1x16": WEIGHTS // 4 + ROWS * 2 + 7 * 2**16 * 8 * 2,
    "aqlm-2x8": WEIGHTS // 4 + ROWS * 2 + 7 * 2 * 2**8 * 8 * 2,
    "torchao-int8": WEIGHTS + ROWS * 5,
    "torchao-int4": WEIGHTS // 2 + GROUPS_64 * 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=3000, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_the_simulated_cpu_agrees_with_the_measured_one_in_every_format(folder, name):
    package = NEEDS.get(name.partition("-")[0])
    if package and not find_spec(package):
        pytest.skip(f"needs {package}")
    case = BenchCase(folder, "qzo", quantization=name, steps=3, seq_len=48, batch_size=2)
    simulated, measured = sim_cpu.run(case), cpu.run(case)
    assert simulated["peak"]["allocated"] == pytest.approx(measured["peak"]["allocated"], rel=TOLERANCE)
    assert simulated["components"] == measured["components"] and simulated["floor"] == measured["floor"]
    about = measured["case"]["quantization"]
    assert about == simulated["case"]["quantization"] and about["format"] in name
    assert named(about) == (None if name in ("gptq", "gptq-4") else name)
    assert about.get("offsets") == ("follow" if name in FOLLOWING else None)
    again = simulated_case(measured)
    assert again.quantization == named(about) and (again.still_offsets or name in FOLLOWING)
    assert again.group_size in (None, about["group_size"])


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_the_format(folder, name):
    model = build_empty(resolve(folder), torch.bfloat16, "eager")
    quantize_as(model, name)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    sizes = quantized_bytes(model)
    assert sum(sizes.values()) - sizes["scale_count"] == BYTES[name]


@pytest.mark.parametrize("name", FOLLOWING)
def test_offsets_that_follow_take_eight_bytes_a_scale(folder, name):
    if not find_spec(NEEDS[name.partition("-")[0]]):
        pytest.skip(f"needs {NEEDS[name.partition('-')[0]]}")
    follow = BenchCase(folder, "qzo", quantization=name, seq_len=16)
    more, less = (sim_cpu.run(case)["at_peak"]["optimizer"] for case in (follow, replace(follow, still_offsets=True)))
    assert more - less == 8 * (GROUPS_64 if name == "torchao-int4" else GROUPS_32)


@pytest.mark.parametrize("name", ["nf4", "gguf-q4_0", "aqlm-2x8"])
def test_a_gpu_is_simulated_and_embeddings_may_be_quantized_too(folder, name):
    options = {"quantization": name, "device": "sim", "gpu": "rtx-4090", "seq_len": 16}
    plain, full = (sim.run(BenchCase(folder, method, **options)) for method in ("qzo", "qzo-full"))
    assert full["components"]["codes"] == plain["components"]["codes"] + 3000 * 576
    assert full["floor"] < plain["floor"] and full["case"]["quantization"] == plain["case"]["quantization"]


def test_gptq_4_is_what_the_methods_do_by_default(folder):
    runs = [BenchCase(folder, "qzo", quantization=name, seq_len=16) for name in (None, "gptq", "gptq-4")]
    default, *others = (sim_cpu.run(case) for case in runs)
    for other in others:
        assert other == default


def test_the_tables_tell_the_format_and_other_methods_are_left_as_they_are(folder, tmp_path, capfd):
    options = ["run", folder, "--device", "sim", "--gpu", "rtx-4090", "--seq-len", "16", "--out", str(tmp_path)]
    assert main([*options, "--methods", "qzo,mezo", "--quantization", "hqq-2"]) == 0
    shown = capfd.readouterr().out
    assert "| qzo (hqq-2)" in shown and "| mezo " in shown
    record = json.loads((tmp_path / "qzo.json").read_text(encoding="utf-8"))
    assert record["case"]["quantization"] == {"format": "hqq", "bits": 2, "group_size": 64}
    assert json.loads((tmp_path / "mezo.json").read_text(encoding="utf-8"))["case"]["quantization"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantization", "nf5"], "unknown quantization 'nf5'; did you mean nf4"),
        (["--quantization", "nf4", "--methods", "mezo"], "is for qzo and qzo-full; add one of them"),
        (["--quantization", "gguf-q4_0", "--group-size", "64"], "which has groups of 32; leave it out"),
        (["--quantization", "int8", "--group-size", "64"], "which has one scale for each row"),
    ],
)
def test_names_and_sizes_that_do_not_fit_are_one_line_and_exit_code_two(folder, capsys, options, words):
    assert main(["run", folder, "--device", "sim", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_layer_that_does_not_fit_is_named(folder):
    model = build_empty(resolve(folder), torch.bfloat16, "eager")
    with pytest.raises(QzoError, match="q_proj: "):
        quantize_as(model, "awq", 100)


def test_formats_are_listed(capsys):
    assert main(["list", "quantizations"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FORMATS)
    assert "nf4           4 bits, groups of 64" in lines and "int8          8 bits, one scale a row" in lines
