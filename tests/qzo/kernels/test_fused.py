"""Which layers are given to kernels in Triton, and what they allocate: on `meta`, where a GPU is simulated."""

from itertools import pairwise

import pytest
import torch
from packed_layers import FORMATS, gguf, gptq, nf4

from bench.ledger.ledger import Ledger
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.kernels import asked, fused
from qzo.kernels.rebuilt import CHUNK_ELEMENTS, kept_weights


@pytest.fixture(autouse=True)
def asked_anew():
    asked._by_environment.cache_clear()
    yield
    asked._by_environment.cache_clear()


def peak(layer, rows):
    """The most bytes beside x and y that a product of so many rows has."""
    x = torch.empty(rows, layer.in_features, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), Ledger("meta") as ledger:
        ledger.see(x)
        y = layer(x)
    return ledger.peak_bytes() - x.nbytes - y.nbytes


def test_nothing_uses_them_unless_they_are_asked_for(monkeypatch):
    layer = QuantLinear.empty(4096, 4096, device="meta")
    monkeypatch.delenv(asked.VARIABLE, raising=False)
    assert not asked.is_asked() and peak(layer, 640) > 8 * CHUNK_ELEMENTS
    with asked.by_triton():
        assert asked.is_asked() and peak(layer, 640) == 2 * 4096 * 4096
        with asked.by_triton(False):
            assert not asked.is_asked()


@pytest.mark.parametrize(("word", "is_asked"), [("triton", True), ("Triton", True), ("operators", False), ("", False)])
def test_the_environment_asks_for_them(monkeypatch, word, is_asked):
    monkeypatch.setenv(asked.VARIABLE, word)
    assert asked.is_asked() == is_asked


def test_another_word_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv(asked.VARIABLE, "cuda")
    with pytest.raises(QzoError, match="QZO_KERNELS='cuda' is not known; choose operators or triton"):
        asked.is_asked()


def test_on_a_gpu_what_is_lacking_is_advised(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(asked, "find_spec", lambda name: name)
    assert asked.advice(cuda, "generator").endswith("begin with QZO_KERNELS=triton and --noise philox")
    with asked.by_triton():
        assert asked.advice(cuda, "generator").endswith("begin with --noise philox")
        assert asked.advice(cuda, "philox") is None
    assert asked.advice(torch.device("cpu"), "generator") is None
    monkeypatch.setattr(asked, "find_spec", lambda name: None)
    assert asked.advice(cuda, "generator") is None


def test_without_the_package_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(asked, "find_spec", lambda name: None)
    asked.kernels.cache_clear()
    assert not asked.is_carrier()
    monkeypatch.setattr(asked, "DEVICES", ("cpu",))
    with asked.by_triton(), torch.no_grad(), pytest.raises(QzoError, match=r"pip install 'qzo\[triton\]'"):
        gptq((32, 32))(torch.randn(1, 32))


def test_few_rows_need_no_memory_and_many_a_part_of_the_weight():
    layer = QuantLinear.empty(5120, 13824, device="meta")
    with asked.by_triton():
        assert peak(layer, 128) == 0
        assert peak(layer, 129) == 2 * 6912 * 5120  # two parts of the largest layer of a 13B model


def test_parts_begin_at_multiples_of_64_rows_and_have_all():
    for shape in ((32000, 4096), (151_936, 8192), (10, 2**24), (7, 3)):
        bounds = fused.rebuilt_bounds(shape)
        assert bounds[0][0] == 0 and bounds[-1][1] == shape[0]
        assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))
        assert all(start % 64 == 0 and start < stop for start, stop in bounds)
    assert fused.rebuilt_bounds((11008, 4096)) == [(0, 11008)]


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_describes_its_own_tensors(name):
    layer = FORMATS[name]((96, 160))
    packed = layer.packed()
    assert packed.shape == (96, 160) and fused.can_multiply(packed, torch.empty(3, 160))
    owned = {tensor.untyped_storage().data_ptr() for tensor in layer.buffers()}
    tensors = [packed.codes, packed.scales, packed.zeros, packed.order, packed.offsets, packed.table]
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)} <= owned


def test_what_they_do_not_take_is_left_to_operators(monkeypatch):
    """Elsewhere, where a derivative is wanted, or weights are kept; types of GGUF and rows that they cannot read."""
    x = torch.randn(2, 64)

    def products(layer, x):
        with asked.by_triton():
            return fused.product(x, layer.packed, layer.scales)

    assert products(gptq((32, 64)), x) is None  # on the CPU
    monkeypatch.setattr(asked, "DEVICES", ("cpu",))
    monkeypatch.setattr(asked, "kernels", lambda name: None)
    assert not fused.can_multiply(gptq((32, 64)).packed(), x.double())
    assert not fused.can_multiply(gptq((32, 64)).packed(), torch.randn(2, 32))
    assert not fused.can_multiply(nf4((8, 33)).packed(), torch.randn(2, 33))
    assert gguf((8, 32), "Q5_0").packed() is None and gguf((8, 256), "Q4_K").packed() is None
    assert products(gptq((32, 64)), x.clone().requires_grad_()) is None
    layer = gptq((32, 64))
    layer.scales.requires_grad_()
    assert products(layer, x) is None
    layer.scales.requires_grad_(False)
    monkeypatch.setattr(fused, "multiply", None)
    with asked.by_triton(), kept_weights():
        assert layer(x).shape == gguf((32, 64), "Q4_0")(x).shape == (2, 32)
