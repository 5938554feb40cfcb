"""The simulated world: exact bytes, published ratios, and equality of the shortcut with the full trace."""

import contextlib

import pytest
import torch

from bench.cases.case import BenchCase
from bench.cases.methods import BY_NAME, METHODS
from bench.cases.recipes.table import BARE
from bench.ledger.repeat_training import NotAlike
from bench.simulator.allocator.replay import replay
from bench.worlds import sim
from qzo.errors import QzoError
from qzo.kernels import rebuilt


def simulate(model: str, method: str, **options) -> dict:
    return sim.run(BenchCase(model, method, gpu="rtx-4090", **options))


@pytest.fixture(scope="module")
def llama2_13b() -> dict[str, dict]:
    return {method: simulate("llama2-13b", method) for method in ("ft-bf16", "ft-mixed", "ft-amp", "qzo", "qlora")}


def test_full_fine_tuning_of_13b_is_exact_to_the_byte(llama2_13b):
    record = llama2_13b["ft-mixed"]
    assert record["parameters"] == {"total": 13_015_864_320, "trainable": 13_015_864_320}
    assert record["at_peak"]["weights"] == 26_031_728_640
    assert record["at_peak"]["gradients"] == 26_031_728_640
    assert record["at_peak"]["optimizer"] == 104_126_914_560  # the step counters are Python integers


def test_the_three_conventions_hold_8_12_and_16_bytes_a_parameter(llama2_13b):
    counters = 363 * 512  # fused AdamW keeps one on the GPU for each parameter, and 512 bytes is the least
    for method, nbytes, extra in (("ft-bf16", 8, counters), ("ft-mixed", 12, 0), ("ft-amp", 16, counters)):
        held = llama2_13b[method]["at_peak"]
        assert held["weights"] + held["gradients"] + held["optimizer"] == nbytes * 13_015_864_320 + extra


def test_qzo_of_13b_is_exact_to_the_byte(llama2_13b):
    record = llama2_13b["qzo"]
    assert record["parameters"]["trainable"] == 99_123_200
    parts = record["components"]
    assert parts["codes"] == 6_343_884_800
    assert parts["scales"] == 2 * 99_123_200
    assert parts["embeddings"] == 655_360_000
    assert parts["norms"] == 829_440
    assert record["at_peak"]["optimizer"] == 4 * 99_123_200  # the fp32 masters


def test_qlora_of_13b_has_its_packed_weights_and_an_absmax_for_each_64(llama2_13b):
    parts = llama2_13b["qlora"]["components"]
    linear = 12_687_769_600
    assert parts["codes"] == linear // 2
    assert parts["scales"] == linear // 64 * 4 + 280 * 16 * 4  # absmax, and a table of 16 values for each layer


@pytest.mark.parametrize(
    ("model", "method"),
    [("llama2-7b", "qzo"), ("llama2-13b", "qzo"), ("opt-6.7b", "qzo"), ("llama3.1-8b", "qzo-full")],
)
def test_reduction_against_ft_mixed_is_at_least_eighteen(model, method):
    full, small = simulate(model, "ft-mixed"), simulate(model, method)
    assert full["peak"]["allocated"] / small["peak"]["allocated"] >= 18


@pytest.mark.parametrize("model", ["llama2-7b", "llama2-13b", "opt-6.7b", "llama3.1-8b"])
def test_qzo_peaks_at_most_ten_percent_above_its_floor(model):
    record = simulate(model, "qzo")
    assert record["peak"]["allocated"] <= 1.1 * record["floor"]


def test_qzo_of_13b_fits_on_a_24_gib_card(llama2_13b):
    assert llama2_13b["qzo"]["peak"]["process"] < 24 * 2**30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["opt-125m", "gpt2"])
def test_every_method_runs_and_its_roles_add_up(model, method):
    record = simulate(model, method, seq_len=32)
    assert record["status"] == "ok"
    assert sum(record["at_peak"].values()) == record["peak"]["allocated"]
    assert record["peak"]["allocated"] <= record["peak"]["reserved"] < record["peak"]["process"]
    names = [phase["name"] for phase in record["phases"]]
    first = ["load", "forward", "backward", "step"]
    assert names == (first if BY_NAME[method].first_order else
                     ["load", "perturb", "forward-plus", "forward-minus", "update"])  # fmt: skip


@pytest.mark.parametrize("method", ["ft-amp", "lora", "qlora", "qzo"])
def test_mixture_of_experts_runs(method, tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, num_local_experts=4, num_experts_per_tok=2, head_dim=64, architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    record = simulate(str(tmp_path), method, seq_len=32)
    assert record["status"] == "ok"
    if method == "qzo":
        experts = 3 * 4 * 3 * 256 * 512
        assert record["components"]["codes"] == (experts + 3 * (2 * 256 * 256 + 2 * 256 * 128)) // 2


def test_checkpointing_trades_activations_for_time():
    options = {"seq_len": 512, "batch_size": 4}
    for method in ("lora", "qlora", "ft-amp"):
        plain, saved = (simulate("opt-125m", method, gradient_checkpointing=on, **options) for on in (False, True))
        assert saved["at_peak"]["activations"] < 0.5 * plain["at_peak"]["activations"]
        assert saved["peak"]["allocated"] < plain["peak"]["allocated"]
        assert saved["case"]["gradient_checkpointing"] is True


def test_eager_attention_makes_score_matrices_and_flash_does_not():
    eager, flash = (simulate("opt-125m", "ft-bf16", seq_len=1024, attention=name) for name in ("eager", "flash"))
    peaks = [{phase["name"]: phase["peak_allocated"] for phase in record["phases"]} for record in (eager, flash)]
    scores = 12 * 12 * 1024 * 1024 * 2  # layers x heads x tokens x tokens in bf16, kept for backward
    assert peaks[0]["forward"] - peaks[1]["forward"] > scores


@pytest.mark.parametrize("method", ["mezo", "qzo", "qzo-2bit"])
@pytest.mark.parametrize("model", ["opt-125m", "gemma2-2b"])
def test_tracing_identical_layers_once_changes_no_byte(model, method, monkeypatch):
    quick = simulate(model, method, seq_len=64)
    monkeypatch.setattr(sim, "repeated_layers", lambda ledger, model: contextlib.nullcontext())
    full = simulate(model, method, seq_len=64)
    assert quick == full


@pytest.mark.parametrize(
    ("method", "checkpointing"), [("lora", False), ("lora", True), ("qlora", True), ("ft-amp", False), ("ft-amp", True),
     ("qlora-lean", False), ("peqa-lean", False)],
)  # fmt: skip
def test_repeating_layers_of_a_training_step_changes_no_byte(method, checkpointing, monkeypatch, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=1000,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    options = {"seq_len": 32, "gradient_checkpointing": checkpointing}
    monkeypatch.setattr(sim, "NotAlike", ())  # nothing is traced in full behind the test's back
    quick = simulate(str(tmp_path), method, **options)
    monkeypatch.setattr(sim, "repeated_layers", lambda ledger, model: contextlib.nullcontext())
    assert simulate(str(tmp_path), method, **options) == quick


def test_layers_that_are_not_alike_are_traced_in_full(monkeypatch):
    full = simulate("opt-125m", "ft-sgd", seq_len=16)

    def not_alike(*_):
        raise NotAlike

    monkeypatch.setattr(sim, "repeated_layers", not_alike)
    assert simulate("opt-125m", "ft-sgd", seq_len=16) == full


def test_a_simulation_leaves_the_global_rng_alone():
    before = torch.get_rng_state()
    simulate("opt-125m", "qzo", seq_len=16)
    assert torch.equal(before, torch.get_rng_state())


def test_a_record_says_where_another_attention_kernel_ran():
    options = {"batch_size": 1, "seq_len": 64}
    assert not any("attention ran" in note for note in simulate("smollm2-135m", "qlora", **options)["notes"])
    options["recipe"] = BARE["qlora"]  # without autocast, in fp32
    assert "attention ran the math kernel where flash cannot" in simulate("smollm2-135m", "qlora", **options)["notes"]
    with pytest.raises(QzoError, match=r"flash attention needs fp16 or bf16.*choose efficient, math or eager"):
        simulate("smollm2-135m", "qlora", attention="flash", **options)


@pytest.mark.parametrize("method", ["qzo", "peqa-lean"])
def test_walking_through_three_of_a_layers_chunks_changes_no_byte(method, monkeypatch, llama_folder):
    monkeypatch.setattr(rebuilt, "CHUNK_ELEMENTS", 2**12)  # 4 or 8 chunks a layer
    quick = simulate(str(llama_folder), method, seq_len=16)
    monkeypatch.setattr(rebuilt, "_walked", lambda shape, x: rebuilt.chunk_bounds(*shape))
    assert simulate(str(llama_folder), method, seq_len=16) == quick


@pytest.mark.parametrize("method", ["mezo", "qzo"])
def test_layers_that_are_traced_once_leave_the_events_of_all(method, llama_folder, monkeypatch):
    traces = []

    def kept(ledger):
        traces.append([(event.sign, event.block.nbytes) for event in ledger.events])
        return replay(ledger)

    monkeypatch.setattr(sim, "replay", kept)
    simulate(str(llama_folder), method, seq_len=64)
    monkeypatch.setattr(sim, "repeated_layers", lambda ledger, model: contextlib.nullcontext())
    simulate(str(llama_folder), method, seq_len=64)
    assert traces[0] == traces[1]  # also of the last layer, whose MLP computes what the head reads and no more
