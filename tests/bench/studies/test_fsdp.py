"""FSDP for one rank: shards, gathers and gradients to the byte on small Llamas."""

from functools import cache

import pytest
import torch
from transformers import LlamaConfig

from bench.cases.case import BenchCase
from bench.cases.models import resolve
from bench.studies.fsdp import MODES, PRECISIONS, FsdpPeak, FsdpSetting, simulate
from bench.worlds import sim
from bench.worlds.sim import SimWorld
from qzo.errors import QzoError

LAYERS, WIDTH, VOCABULARY = 4, 256, 2048
SEQ_LEN = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, str]:
    """The same small Llama with tied embeddings (True) and without."""
    folders = {tied: tmp_path_factory.mktemp("tiny-llama") for tied in (True, False)}
    for tied, path in folders.items():
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
            vocab_size=VOCABULARY, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"],
        ).save_pretrained(path)  # fmt: skip
    return {tied: str(path) for tied, path in folders.items()}


@pytest.fixture(scope="module")
def folder(folders) -> str:
    return folders[False]


@cache
def run(folder: str, gpus: int, mode: str = "full-shard", precision: str = "mixed", prefetch: bool = True) -> FsdpPeak:
    return simulate(folder, FsdpSetting(gpus, mode, precision, prefetch), seq_len=SEQ_LEN)


@cache
def units(folder: str) -> tuple[int, ...]:
    """Parameters of each unit: the layers, then the root."""
    model = SimWorld(resolve(folder), "flash").model(torch.bfloat16)
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers]
    return (*layers, sum(parameter.numel() for parameter in model.parameters()) - sum(layers))


def part(numel: int, gpus: int, itemsize: int) -> int:
    """Bytes that the allocator gives for one rank's part of a unit."""
    nbytes = -(-numel // gpus) * itemsize
    return -(-nbytes // 512) * 512


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gpus", [1, 4])
def test_the_shards_of_all_ranks_sum_to_the_whole(folder, gpus, precision):
    chosen = PRECISIONS[precision]
    size = chosen.shard.itemsize
    moment = (chosen.bytes_per_parameter - 2 * size) // 2
    held = run(folder, gpus, precision=precision).at_peak
    assert held["weights"] == sum(part(numel, gpus, size) for numel in units(folder))
    counter = 512 if precision in ("bf16", "amp") else 0  # fused AdamW keeps its step counters on the GPU
    assert held["optimizer"] == sum(2 * part(numel, gpus, moment) + counter for numel in units(folder))
    assert gpus * held["weights"] - size * sum(units(folder)) in range(gpus * 512 * (LAYERS + 1))


def test_a_shard_is_padded_to_the_same_size_on_every_rank(folder):
    assert any(numel % 3 for numel in units(folder))
    assert run(folder, 3).at_peak["weights"] == sum(part(numel, 3, 2) for numel in units(folder))


def test_shard_grad_op_keeps_all_layers_gathered_and_full_shard_two(folder):
    phases = {mode: run(folder, 4, mode).phases for mode in MODES}
    difference = phases["shard-grad-op"]["forward"] - phases["full-shard"]["forward"]
    assert abs(difference - (LAYERS - 2) * 2 * units(folder)[0]) < 64 << 10  # activations of the last layers
    assert run(folder, 4).allocated < run(folder, 4, "shard-grad-op").allocated


def test_more_ranks_hold_less_each_and_more_together(folder):
    peaks = {gpus: run(folder, gpus).allocated for gpus in (2, 4, 8)}
    assert peaks[2] > peaks[4] > peaks[8]
    assert 2 * peaks[2] < 4 * peaks[4] < 8 * peaks[8]


def test_one_gpu_is_ft_mixed_plus_the_flat_gradient_of_the_root(folder):
    plain = sim.run(BenchCase(folder, "ft-mixed", gpu="a100-80gb", seq_len=SEQ_LEN))
    sharded = run(folder, 1)
    for role in ("weights", "optimizer"):
        assert sharded.at_peak[role] == plain["at_peak"][role]
    gradients = 2 * sum(units(folder))
    joined = 2 * units(folder)[-1]  # the gradients of embedding, head and norm exist on their own beside the flat one
    workspaces = 2 * ((8 << 20) + (128 << 10))  # cuBLAS, for forward and backward
    held = sharded.at_peak["weights"] + sharded.at_peak["optimizer"] + gradients + joined + workspaces
    assert 0 <= sharded.phases["backward"] - held < 32 << 10  # the batch, the rotary table, the loss


def test_prefetch_gathers_at_most_one_layer_more(folder):
    ahead, late = (run(folder, 4, prefetch=on) for on in (True, False))
    assert 0 <= ahead.phases["backward"] - late.phases["backward"] <= 2 * units(folder)[0]
    assert ahead.phases["forward"] == late.phases["forward"]


def test_a_tied_parameter_is_kept_once(folders):
    tied, untied = (run(folders[tied], 2).at_peak["weights"] for tied in (True, False))
    assert untied - tied == part(VOCABULARY * WIDTH, 2, 2)


def test_two_runs_agree_to_the_byte(folder):
    assert run(folder, 4) == run.__wrapped__(folder, 4)


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"gpus": 0}, "at least 1"), ({"gpus": 2, "mode": "full-sharp"}, "full-shard"),
     ({"gpus": 2, "precision": "mixd"}, "mixed")],
)  # fmt: skip
def test_settings_are_checked(setting, words):
    with pytest.raises(QzoError, match=words):
        FsdpSetting(**setting)
