"""The table of GPUs."""

import pytest

from bench import gpus
from qzo.errors import QzoError

MIB = 1 << 20


def test_a_measured_context_is_exact_and_an_unmeasured_one_says_so():
    assert gpus.get("t4").context_bytes == 141 * MIB
    assert gpus.get("t4").context_note is None
    note = gpus.get("rtx-4090").context_note
    assert note is not None and "not measured" in note
    assert gpus.get("rtx-4090").context_low_bytes < gpus.get("rtx-4090").context_high_bytes


def test_flash_attention_starts_with_ampere():
    assert gpus.get("a100-80gb").has_flash
    assert not gpus.get("t4").has_flash


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(QzoError, match="rtx-4090"):
        gpus.get("rtx4090")


def test_names_are_sorted_by_memory():
    sizes = [gpus.get(name).memory_bytes for name in gpus.names()]
    assert sizes == sorted(sizes) and len(sizes) > 15
