"""The measured GPU world: what can be tested without a GPU, and (marked cuda) the rest."""

import pytest
import torch

from bench.case import BenchCase
from bench.worlds import cuda
from qzo.errors import QzoError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_without_a_gpu_the_world_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QzoError, match="needs an NVIDIA GPU"):
        cuda.run(BenchCase("opt-125m", "qzo", device="cuda"))


def test_allocator_peak_is_read_from_pytorchs_statistics(monkeypatch):
    statistics = {"allocated_bytes.all.peak": 700, "reserved_bytes.all.peak": 2048}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: statistics)
    assert cuda.allocator_peak(resident=500) == {"allocated": 700, "reserved": 2048}
    assert cuda.allocator_peak(resident=900)["allocated"] == 900


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize(
    "method", ["ft-bf16", "ft-mixed", "ft-amp", "ft-sgd", "lora", "qlora", "mezo", "qzo", "qzo-full", "qzo-2bit"]
)
def test_measured_and_simulated_peaks_agree(method):
    from bench.worlds import sim

    measured = cuda.run(BenchCase("opt-125m", method, device="cuda"))
    simulated = sim.run(BenchCase("opt-125m", method, gpu="h100-80gb"))
    assert sum(measured["at_peak"].values()) == measured["peak"]["allocated"]
    assert simulated["peak"]["allocated"] == pytest.approx(measured["peak"]["allocated"], rel=0.05)
