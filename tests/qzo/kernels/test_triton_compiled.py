"""Kernels in Triton as they are compiled for GPUs that are not here: none spills, none asks for more than there is.

Each kernel for each format once, and for each GPU with the formats that need most; tests/attack has all combinations.
"""

import pytest
from compiled_kernels import CAPABILITIES, fits, needs
from packed_layers import FORMATS

DEMANDING = ("gptq-3-zeros-order", "gguf-q4_1", "nf4")
CASES = {
    *(("rebuild", name, 90) for name in FORMATS),
    *(("product", name, 89) for name in FORMATS),
    *(("dual", name, 90) for name in FORMATS),
    *((kernel, name, gpu) for kernel in ("rebuild", "product", "dual") for name in DEMANDING for gpu in CAPABILITIES),
    *(("draw", "nf4", gpu) for gpu in CAPABILITIES),
}


@pytest.mark.parametrize(("kernel", "name", "capability"), sorted(CASES))
def test_a_kernel_fits(kernel, name, capability):
    found = needs(kernel, name, capability)
    assert fits(found), found
