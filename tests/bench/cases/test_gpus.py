"""The table of GPUs."""

import pytest

from bench.cases import gpus
from qzo.errors import QzoError

MIB = 1 << 20


def test_a_measured_context_is_exact_and_an_unmeasured_one_says_so():
    assert gpus.get("t4").context_bytes == 147_718_144  # 140.875 MiB, as in every row of the measurements
    assert gpus.get("t4").context_note is None
    note = gpus.get("rtx-4090").context_note
    assert note is not None and "not measured" in note
    assert gpus.get("rtx-4090").context_low_bytes < gpus.get("rtx-4090").context_high_bytes


def test_an_estimated_context_lies_on_the_line_through_the_two_measured_cards():
    def started(processors: int, threads: int) -> float:
        return gpus.DRIVER_MIB + processors * threads * gpus.THREAD_KIB / 1024

    assert started(40, 1024) == pytest.approx(104.875, abs=0.1)  # T4
    assert started(142, 1536) == pytest.approx(426, abs=0.1)  # RTX 6000 Ada
    h100 = gpus.get("h100-80gb")
    assert h100.context_bytes == pytest.approx((started(132, 2048) + gpus.KERNELS_MIB) * MIB, abs=2)
    assert h100.context_high_bytes == pytest.approx(1.5 * h100.context_low_bytes, abs=2)


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(QzoError, match="rtx-4090"):
        gpus.get("rtx4090")


def test_names_are_sorted_by_memory():
    sizes = [gpus.get(name).memory_bytes for name in gpus.names()]
    assert sizes == sorted(sizes) and len(sizes) > 15
