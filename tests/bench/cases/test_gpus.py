"""The table of GPUs."""

import pytest

from bench.cases import gpus
from qzo.errors import QzoError

MIB = 1 << 20


def test_a_measured_context_is_exact_and_an_unmeasured_one_says_so():
    assert gpus.get("t4").context_bytes() == 147_718_144  # 140.875 MiB, as in every row of the measurements
    assert gpus.get("t4").context_note() is None
    assert gpus.get("h100-80gb").context_bytes() == 758 * MIB
    assert gpus.get("h100-80gb").context_bytes(backward=False) == 686 * MIB
    note = gpus.get("rtx-4090").context_note()
    assert note is not None and "not measured" in note


def test_without_backward_there_are_fewer_kernels():
    for name in gpus.names():
        gpu = gpus.get(name)
        assert gpu.context_bytes(backward=False) < gpu.context_bytes(), name


def test_an_estimated_context_lies_on_the_line_through_the_measured_cards():
    def started(processors: int, threads: int) -> float:
        return gpus.DRIVER_MIB + processors * threads * gpus.THREAD_KIB / 1024

    assert started(40, 1024) == pytest.approx(104.875, abs=0.1)  # T4
    assert started(142, 1536) == pytest.approx(426, abs=0.1)  # RTX 6000 Ada
    assert started(132, 2048) == pytest.approx(518, abs=3)  # H100, which the line was not drawn through
    low, high = gpus.get("h200").contexts["training"]  # the H100's processors
    assert low / MIB == pytest.approx(started(132, 2048) + 36, abs=0.1)
    assert low < 758 * MIB < high


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(QzoError, match="rtx-4090"):
        gpus.get("rtx4090")


def test_names_are_sorted_by_memory():
    sizes = [gpus.get(name).memory_bytes for name in gpus.names()]
    assert sizes == sorted(sizes) and len(sizes) > 15
