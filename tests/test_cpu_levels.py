"""Other CPUs on this one: what depends on instructions and threads, tested once more below what this CPU has.

`ATEN_CPU_CAPABILITY` lowers what PyTorch's own kernels use, `ONEDNN_MAX_CPU_ISA` its matrix products. Each is read
once, so a level is a process of its own. The level of this CPU is that of the whole test suite.
"""

import os
import platform
import re
import subprocess
import sys
from itertools import repeat, zip_longest
from pathlib import Path

import pytest
import torch

from qzo.kernels import instructions

ROOT = Path(__file__).parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
ATEN = ("default", "avx2", "avx512")
ONEDNN = {"AVX2": "no bf16 instructions", "AVX512_CORE": "no bf16 instructions", "AVX512_CORE_BF16": "AVX512-BF16"}
AFFECTED = (
    "tests/bench/worlds/test_cpu.py",
    "tests/bench/simulator/cpu/test_kernels.py",
    "tests/bench/cases/test_quantizations.py::test_the_simulated_cpu_agrees_with_the_measured_one_in_every_format",
    "tests/bench/worlds/test_sim_cpu.py",
    "tests/qzo/formats/bnb/test_layer.py",
    "tests/qzo/formats/gptq/test_layer.py",
    "tests/qzo/kernels/test_native.py",
)


def lower_levels() -> list[tuple[str, str]]:
    """(variable, value) of each level that is below what is used here."""
    return [*zip(repeat("ATEN_CPU_CAPABILITY"), lower_aten()), *zip(repeat("ONEDNN_MAX_CPU_ISA"), lower_onednn())]


def lower_aten() -> tuple[str, ...]:
    """Levels of PyTorch's own kernels, the lowest first."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return () if not X86 else ATEN[: ATEN.index(capability)] if capability in ATEN else ATEN


def lower_onednn() -> tuple[str, ...]:
    """Levels of the matrix products, the lowest first."""
    has_avx512 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tuple(ONEDNN)[: has_avx512 + instructions.has_bf16() + instructions.has_tiles()] if X86 else ()


def other_cpus() -> list[dict[str, str]]:
    """Variables of a process each, in which every lower level occurs once, and that of more threads."""
    pairs = zip_longest(lower_aten(), lower_onednn())
    lowered = [{"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn} for aten, onednn in pairs]
    known = [{name: value for name, value in variables.items() if value} for variables in lowered]
    return [*known, {"OMP_NUM_THREADS": "4"}]


def run(variables: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    environment = {name: kept for name, kept in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= variables | {"OMP_WAIT_POLICY": "passive"}  # there may be fewer cores than threads
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("variable", "value"), lower_levels())
def test_a_variable_lowers_what_is_used(variable, value):
    code = "import torch, qzo.kernels.instructions as i; "
    code += "print(torch.backends.cpu.get_cpu_capability(), i.described(), sep=':')"
    capability, described = run({variable: value}, "-c", code).stdout.strip().split(":")
    if variable == "ATEN_CPU_CAPABILITY":
        assert capability == value.upper()
    else:
        assert described == ONEDNN[value]


@pytest.mark.parametrize("variables", other_cpus(), ids=lambda variables: "-".join(variables.values()))
def test_what_depends_on_instructions_holds_at_every_level(variables):
    done = run(variables, "-m", "pytest", "-q", "-n", "0", *AFFECTED)
    assert done.returncode == 0, done.stdout[-20_000:]
    assert re.search(r"\d+ passed", done.stdout)
