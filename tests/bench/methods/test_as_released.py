"""MeZO and QZO as released: what their out-of-place steps hold, to the byte, and that they train."""

import pytest
import torch
from transformers import LlamaConfig

import qzo
from bench.cases.case import BenchCase
from bench.cases.methods import EXTRA_METHODS, METHODS
from bench.ledger.ledger import Ledger
from bench.methods.as_released import AUTOTUNE_BYTES, OutOfPlace, whole_product
from bench.worlds import cpu, sim
from bench.worlds.plan import parse_methods

VOCABULARY, WIDTH = 20_000, 256
EMBEDDING = VOCABULARY * WIDTH * 2  # bytes, in fp16 as in bf16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny-llama")
    LlamaConfig(
        hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128, architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    return str(path)


def phases(record: dict) -> dict[str, int]:
    return {phase["name"]: phase["peak_allocated"] for phase in record["phases"]}


def simulate(folder: str, method: str) -> dict:
    record = sim.run(BenchCase(folder, method, gpu="rtx-4090", seq_len=32))
    assert record["status"] == "ok"
    return record


def test_mezo_holds_three_tensors_more_to_perturb_and_four_to_update(folder):
    record = simulate(folder, "mezo-reference")
    weights = sum(record["components"][part] for part in ("embeddings", "linears", "norms"))
    workspace = (8 << 20) + (128 << 10)  # of cuBLAS, there after the first product
    small = range(16 << 10)  # the batch, the losses, the rotary table
    at_peak = record["at_peak"]
    assert at_peak["weights"] == weights
    assert at_peak["noise"] == EMBEDDING  # of the head, which comes last
    assert at_peak["temporaries"] - 3 * EMBEDDING - workspace in small
    unsplit = 1 << 20  # what the allocator does not split off, at most, for each large block of the moment
    perturb = phases(record)["perturb"] - weights - workspace - 3 * EMBEDDING
    assert 0 <= perturb < 4 * unsplit < EMBEDDING


def test_the_distance_to_our_mezo_is_the_temporaries(folder):
    ours, released = simulate(folder, "mezo"), simulate(folder, "mezo-reference")
    distance = released["peak"]["allocated"] - ours["peak"]["allocated"]
    roles = ("noise", "temporaries", "unattributed")
    assert distance == sum(released["at_peak"][role] - ours["at_peak"][role] for role in roles)
    assert distance > 2 * EMBEDDING


def test_qzo_rebuilds_a_whole_weight_and_holds_the_tuning_buffer_once(folder):
    layer = qzo.QuantLinear.empty(WIDTH, 512, dtype=torch.float16, device="meta")
    x = torch.empty(1, 8, WIDTH, dtype=torch.float16, device="meta")
    tuned: set[int] = set()
    peaks = []
    for _ in range(2):
        with Ledger("meta") as ledger:
            y = whole_product(layer, tuned, x)
        peaks.append(ledger.peak_bytes())
        del y
    weight = WIDTH * 512 * 2
    assert peaks == [weight + AUTOTUNE_BYTES, weight + 8 * (WIDTH + 512) * 2]  # x and y


def test_qzo_peaks_while_the_kernel_is_tuned(folder):
    record = simulate(folder, "qzo-reference")
    found = phases(record)
    assert found["forward-plus"] == record["peak"]["allocated"] > AUTOTUNE_BYTES
    assert found["forward-minus"] < record["peak"]["allocated"] - AUTOTUNE_BYTES // 2
    assert record["at_peak"]["optimizer"] == 0  # no masters
    assert record["case"]["dtype"] == "float16"


def test_whole_product_is_the_layers_own():
    torch.manual_seed(0)
    layer = qzo.QuantLinear.from_weight(torch.randn(64, 128), group_size=32, bias=torch.randn(64))
    x = torch.randn(2, 3, 128)
    assert torch.allclose(whole_product(layer, set(), x), layer(x), atol=1e-5)


@pytest.mark.parametrize("method", [method for method in EXTRA_METHODS if method.endswith("-reference")])
def test_it_runs_on_real_tensors(folder, method):
    record = cpu.run(BenchCase(folder, method, device="cpu", seq_len=16, steps=3))
    assert record["status"] == "ok" and all(loss > 0 for loss in record["losses"])
    assert record["case"]["optimizer"] == method


def test_z_is_the_same_in_all_four_sweeps_and_the_update_follows_it():
    weight = torch.zeros(1000)
    optimizer = OutOfPlace([{"params": [("layer.weight", weight)]}], lr=0.5, seed=3)
    seen = []

    def closure() -> torch.Tensor:
        seen.append(weight.clone())
        return weight.sum()

    optimizer.step(closure)
    z = seen[0] / 1e-3
    assert torch.allclose(seen[1], -seen[0], atol=1e-6)
    derivative = float(seen[0].sum() - seen[1].sum()) / 2e-3
    assert torch.allclose(weight, -0.5 * derivative * z, rtol=1e-3, atol=1e-3)


def test_scales_stay_above_their_lowest_value_and_the_derivative_is_clipped():
    scale = torch.full((1000,), 1e-6)
    group = {"params": [("layer.scales", scale)], "lowest": 1e-7}
    OutOfPlace([group], lr=1e-3, seed=0, clip_threshold=1.0).step(lambda: 1e6 * scale.sum())
    assert scale.min() == pytest.approx(1e-7) and scale.max() < 5e-3


def test_the_global_rng_is_left_alone():
    before = torch.get_rng_state()
    weight = torch.zeros(10)
    OutOfPlace([{"params": [("weight", weight)]}], lr=1.0, seed=0).step(lambda: weight.sum())
    assert torch.equal(before, torch.get_rng_state())


def test_a_default_run_is_the_ten_and_extras_run_where_they_are_named():
    assert parse_methods(None) == METHODS and len(METHODS) == 12
    assert not set(EXTRA_METHODS) & set(METHODS)
    assert parse_methods("mezo,mezo-reference") == ("mezo", "mezo-reference")
