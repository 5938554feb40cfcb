"""The simulated CPU against the measured one: all methods on three architectures, phase by phase."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import GPT2Config, LlamaConfig, OPTConfig

from bench.cases.case import BenchCase
from bench.cases.methods import METHODS
from bench.simulator.cpu import gemm as cpu_gemm
from bench.worlds import cpu, sim_cpu
from bench.worlds.cell import run as run_cell
from bench.worlds.plan import cells
from qzo.errors import QzoError
from qzo.kernels.native import by_operators

SHAPE = {"vocab_size": 3000, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"], **SHAPE,
    ),
    "gpt2": GPT2Config(n_embd=768, n_layer=1, n_head=12, architectures=["GPT2LMHeadModel"], **SHAPE),
    "opt": OPTConfig(
        hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_hidden_layers=1, num_attention_heads=12,
        architectures=["OPTForCausalLM"], **SHAPE,
    ),
}  # fmt: skip
TOLERANCE = 0.002  # of what is claimed, 2 %, a tenth


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    paths = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, config in FAMILIES.items():
        config.save_pretrained(paths[name])
    return {name: str(path) for name, path in paths.items()}


def both(model: str, method: str, **options) -> tuple[dict, dict]:
    case = BenchCase(model, method, steps=3, **options)
    return sim_cpu.run(case), cpu.run(case)


def check(simulated: dict, measured: dict) -> None:
    assert simulated["peak"]["allocated"] == pytest.approx(measured["peak"]["allocated"], rel=TOLERANCE)
    names = [[phase["name"] for phase in record["phases"]] for record in (simulated, measured)]
    assert names[0] == names[1]
    for role in ("weights", "quantization", "gradients", "optimizer"):
        assert simulated["at_peak"][role] == measured["at_peak"][role]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_and_measured_peaks_agree(folders, family, method):
    check(*both(folders[family], method, seq_len=48, batch_size=2))


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "ft-bf16", {"gradient_checkpointing": True, "seq_len": 200}),
        ("opt", "ft-amp", {"gradient_checkpointing": True}),
        ("gpt2", "lora", {"attention": "eager"}),
        *(("llama", method, {"seq_len": 32}) for method in ("lora-fa", "dora", "prefix")),
        ("llama", "lora", {"seq_len": 400}),  # the peak is in the forward, where kernels work
    ],
)
def test_peaks_agree_with_checkpointing_with_eager_attention_on_long_sequences_and_of_further_methods(
    folders, family, method, options
):
    check(*both(folders[family], method, **options))


def test_peaks_agree_where_bf16_products_are_the_cpus_own(folders, monkeypatch):
    monkeypatch.setattr(cpu_gemm, "needs_blocks", lambda: False)
    check(*both(folders["llama"], "ft-bf16", seq_len=16))


@pytest.mark.parametrize(("method", "carrier"), [("qzo", by_operators), ("mezo", nullcontext)])
def test_z_of_philox_takes_what_is_predicted(folders, method, carrier):
    with carrier():
        simulated, measured = both(folders["llama"], method, seq_len=16, noise="philox")
    check(simulated, measured)
    for phase, expected in zip(simulated["phases"], measured["phases"], strict=True):
        assert phase["peak_allocated"] == pytest.approx(expected["peak_allocated"], rel=TOLERANCE)


def test_a_simulated_cpu_knows_neither_reserved_nor_process_bytes(folders):
    _, (case,) = cells(BenchCase(folders["opt"], "mezo", device="sim", gpu="cpu", seq_len=16), ["mezo"])
    record = run_cell(case)
    assert record["status"] == "ok" and record["world"] == "simulated" and record["case"]["gpu"] == "cpu"
    assert record["peak"]["reserved"] is None and record["peak"]["process"] is None
    assert record["step_seconds"] is None and record["losses"] is None
    assert sum(record["at_peak"].values()) == record["peak"]["allocated"]
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_simulation_can_stand_for_a_cpu(folders, device):
    with pytest.raises(QzoError, match="add --device sim"):
        cells(BenchCase(folders["opt"], "mezo", device=device, gpu="cpu"), ["mezo"])


def test_moving_keeps_ties_shapes_and_what_is_trained():
    model = nn.Sequential(nn.Embedding(5, 4, device="meta"), nn.Linear(4, 5, bias=False, device="meta"))
    model[1].weight = model[0].weight
    model[0].register_buffer("table", torch.empty(3, 2, device="meta").t())
    model[0].weight.requires_grad_(False)
    with FakeTensorMode():
        sim_cpu.to_cpu(model)
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, FakeTensor) and isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.device.type == "cpu" and not model[0].weight.requires_grad
    assert model[0].table.shape == (2, 3) and model[0].table.stride() == (1, 2)


def test_a_simulation_leaves_the_global_rng_and_real_tensors_alone(folders):
    before = torch.get_rng_state()
    sim_cpu.run(BenchCase(folders["opt"], "ft-sgd", seq_len=16))
    assert torch.equal(before, torch.get_rng_state())
    assert not isinstance(torch.empty(1), FakeTensor)
