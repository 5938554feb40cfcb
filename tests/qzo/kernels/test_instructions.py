"""The instructions that are used: those of the CPU, up to the level that the environment allows."""

import pytest
import torch

from qzo.kernels import instructions


@pytest.fixture(autouse=True)
def the_newest_cpu(monkeypatch):
    """One that has them all, and nothing remembered."""
    for name in instructions.LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    instructions._has.cache_clear()
    yield
    instructions._has.cache_clear()


@pytest.mark.parametrize("name", instructions.LIMITS)
@pytest.mark.parametrize(
    ("limit", "described"),
    [
        ("AVX2", "no bf16 instructions"),
        ("avx512_core", "no bf16 instructions"),
        ("AVX512_CORE_BF16", "AVX512-BF16"),
        ("avx10_1_512", "AVX512-BF16"),
        ("AVX512_CORE_AMX", "AMX"),
        ("AVX10_1_512_AMX_FP16", "AMX"),
        ("DEFAULT", "AMX"),
        ("no such level", "AMX"),  # oneDNN does not mind it either
        ("", "AMX"),
    ],
)
def test_the_environment_holds_a_cpu_to_a_level(monkeypatch, name, limit, described):
    monkeypatch.setenv(name, limit)
    assert instructions.described() == described


def test_a_limit_adds_nothing_to_what_the_cpu_has(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert instructions.has_bf16() and not instructions.has_tiles()
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    instructions._has.cache_clear()
    assert not instructions.has_bf16()
