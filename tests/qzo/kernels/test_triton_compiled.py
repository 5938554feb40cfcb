"""Kernels in Triton as they are compiled for GPUs that are not here: none spills, none asks for more than there is.

Each kernel for each format once, GPUs in turn, and the one that needs most for each GPU; tests/attack/attack_kernels.py
has all combinations.
"""

import pytest
from compiled_kernels import CAPABILITIES, fits, needs
from packed_layers import FORMATS

TURNS = [
    (kernel, name, CAPABILITIES[(number + first) % len(CAPABILITIES)])
    for first, kernel in enumerate(("rebuild", "product", "dual"))
    for number, name in enumerate(FORMATS)
]
CASES = {*TURNS, *(("dual", "gptq-3-zeros-order", gpu) for gpu in CAPABILITIES), ("draw", "nf4", 80)}


@pytest.mark.parametrize(("kernel", "name", "capability"), sorted(CASES))
def test_a_kernel_fits(kernel, name, capability):
    found = needs(kernel, name, capability)
    assert fits(found), found
