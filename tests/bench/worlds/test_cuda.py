"""The measured GPU world: what can be tested without a GPU, and (marked cuda) the rest."""

from types import SimpleNamespace

import pytest
import torch

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.worlds import cuda
from bench.worlds.runner import run_cells
from qzo.errors import QzoError

ENVIRONMENT = ("torch", "transformers", "python", "platform", "gpu", "driver", "commit", "dirty")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_without_a_gpu_the_world_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QzoError, match="needs an NVIDIA GPU"):
        cuda.run(BenchCase("opt-125m", "qzo", device="cuda"))


def test_peaks_are_read_from_pytorchs_statistics_as_phases_end(monkeypatch):
    peaks = iter([(10, 100), (700, 1000), (900, 2000), (800, 1500), (650, 3000)])

    def statistics():
        allocated, reserved = next(peaks)
        return {"allocated_bytes.all.peak": allocated, "reserved_bytes.all.peak": reserved}

    monkeypatch.setattr(torch.cuda, "memory_stats", statistics)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    meter = cuda.Meter()

    def step(batch, enter):
        for phase in ("perturb", "forward-plus", "perturb", "update"):
            enter(phase)
        return 0.5

    assert meter.step(SimpleNamespace(step=step), None) == 0.5
    assert meter.read() == ({"perturb": 800, "forward-plus": 900, "update": 650}, 3000)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize(
    "method", ["ft-bf16", "ft-mixed", "ft-amp", "ft-sgd", "lora", "qlora", "mezo", "qzo", "qzo-full", "qzo-2bit"]
)
def test_measured_and_simulated_peaks_agree(method, tmp_path):
    """In a process of its own, as `bench run` has it: a process keeps the workspaces of its products for good."""
    gpu = gpus.find(torch.cuda.get_device_name()).name
    records = []
    run_cells([BenchCase("opt-125m", method, gpu=gpu), BenchCase("opt-125m", method, "cuda")], tmp_path, records.append)
    simulated, measured = records
    if measured["status"] == "unsupported":
        pytest.skip(measured["message"])
    assert measured["status"] == "ok", measured["message"]
    assert sum(measured["at_peak"].values()) == measured["peak"]["allocated"]
    assert simulated["peak"]["allocated"] == pytest.approx(measured["peak"]["allocated"], rel=0.05)


def test_the_world_runs_from_end_to_end_on_a_stand_in_gpu(monkeypatch, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=100,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    large = {"allocated_bytes.all.peak": 50_000_000, "reserved_bytes.all.peak": 60_000_000}
    stand_ins = {
        "is_available": lambda: True, "get_device_capability": lambda: (8, 0), "get_device_name": lambda: "Stand-in",
        "get_device_properties": lambda: SimpleNamespace(uuid="1-2"), "memory_reserved": lambda: 61_000_000,
        "reset_peak_memory_stats": lambda: None, "memory_stats": lambda: large, "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda.nvml, "process_bytes", lambda uuid: {"GPU-1-2": 90_000_000}[uuid])
    monkeypatch.setattr(cuda.nvml, "foreign_processes", lambda uuid: [4711])
    monkeypatch.setattr(cuda, "environment", lambda: dict.fromkeys(ENVIRONMENT))
    record = cuda.run(BenchCase(str(tmp_path), "qzo", device="cuda", seq_len=16, steps=3))
    assert record["world"] == "measured-cuda" and record["case"]["gpu"] == "Stand-in"
    assert record["peak"] == {"allocated": 50_000_000, "reserved": 60_000_000, "process": 90_000_000}
    assert record["at_peak"]["unattributed"] > 0 and len(record["losses"]) == 3
    assert "other processes were on the GPU: not timed" in record["notes"] and record["step_seconds"] is None
    assert "the steps after those that count reserved 1,000,000 bytes more" in record["notes"]
    monkeypatch.setattr(cuda.nvml, "foreign_processes", lambda uuid: [])
    assert cuda.run(BenchCase(str(tmp_path), "qzo", device="cuda", seq_len=16, steps=3))["step_seconds"] > 0
