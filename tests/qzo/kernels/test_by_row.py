"""Compiled code for codes along rows against the operators of each format: the same bits, and products as exact."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from qzo.errors import QzoError
from qzo.formats.aqlm.layer import AqlmLayout, AqlmLinear
from qzo.formats.awq.layer import AwqLinear
from qzo.formats.bnb.layer import BnbLinear4bit, BnbLinear8bit
from qzo.formats.compressed.layer import CompressedLinear
from qzo.formats.compressed.scheme import Scheme
from qzo.formats.gguf.codes import BLOCK_TYPES
from qzo.formats.gguf.layer import GgufEmbedding, GgufLinear
from qzo.formats.hqq.layer import HqqLinear
from qzo.formats.torchao.layer import AoInt4Linear, AoInt8Linear
from qzo.kernels import by_row, native
from qzo.kernels.instructions import has_bf16
from qzo.kernels.rebuilt import kept_weights

pytestmark = pytest.mark.skipif(not native.is_compiled(), reason="the package was installed without a compiler")
multiplies = pytest.mark.skipif(
    not native.is_compiled() or not native._panel_columns() or not has_bf16(), reason="needs AVX512-BF16"
)
N, K = 88, 192  # two panels, of which the second is not full; three groups of 64
TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.has_scale}


def scheme(packing: str, n_bits: int, symmetric: bool, strategy: str = "group") -> Scheme:
    return Scheme(packing, n_bits, symmetric, strategy, 32 if strategy == "group" else None, False, {})


LAYERS = {
    **{name: lambda kind=kind: GgufLinear.empty(K, N, kind) for name, kind in TYPES.items()},
    "nf4": lambda: BnbLinear4bit.empty(K, N, block_size=64),
    "int8 of bitsandbytes": lambda: BnbLinear8bit.empty(K, N),
    **{f"hqq {bits} bits": lambda bits=bits: HqqLinear.empty(K, N, bits) for bits in (8, 4, 3, 2, 1)},
    "int8 of torchao": lambda: AoInt8Linear.empty(K, N, group_size=32),
    "int4 of torchao": lambda: AoInt4Linear.empty(K, N, group_size=64),
    "4 bits in words": lambda: CompressedLinear.empty(K, N, scheme("pack-quantized", 4, True)),
    "4 bits and zeros in words": lambda: CompressedLinear.empty(K, N, scheme("pack-quantized", 4, False)),
    "8 bits in words": lambda: CompressedLinear.empty(K, N, scheme("pack-quantized", 8, False)),
    "int8, one scale": lambda: CompressedLinear.empty(K, N, scheme("int-quantized", 8, True, "tensor")),
    "awq": lambda: AwqLinear.empty(K, N, 64),
    "a codebook": lambda: AqlmLinear.empty(K, N, AqlmLayout(1, 16)),
    "two codebooks": lambda: AqlmLinear.empty(K, N, AqlmLayout(2, 8)),
}


@pytest.fixture(autouse=True)
def on_tiles_too():
    with native.products_on_tiles():
        yield


@pytest.fixture(params=LAYERS)
def layer(request):
    """A layer of random bytes, with numbers of everyday size beside them."""
    torch.manual_seed(0)
    made = LAYERS[request.param]()
    for buffer in made.buffers():
        buffer.copy_(torch.randn(buffer.shape)) if buffer.is_floating_point() else buffer.view(torch.uint8).random_()
    for number in made.views().values():
        number.copy_(torch.randn(number.shape))
    return made


def part_of(layer, *rows, dtype):
    if isinstance(layer, GgufLinear):
        return layer.rows(*rows, dtype, *layer.trained())
    return layer._rows(*rows, dtype, layer.scales)


@contextmanager
def counted(monkeypatch, name):
    """How often a function of the compiled library is called."""
    calls, function = [], getattr(native.library(), name)
    monkeypatch.setattr(native.library(), name, lambda *arguments: calls.append(name) or function(*arguments))
    yield calls


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("rows", [(0, N), (19, 50)])
def test_the_same_bits_as_operators(layer, dtype, rows, monkeypatch):
    name = "qzo_rebuild" if isinstance(layer, AwqLinear) else "qzo_rebuild_by_row"
    with counted(monkeypatch, name) as calls:
        ours = part_of(layer, *rows, dtype=dtype)
    with native.by_operators():
        theirs = part_of(layer, *rows, dtype=dtype)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert ours.dtype == dtype and len(calls) == (dtype == torch.bfloat16 or not isinstance(layer, AqlmLinear))
    assert torch.equal(ours.contiguous().view(bits), theirs.contiguous().view(bits))


@multiplies
@pytest.mark.parametrize("count", [1, 13])
def test_products_are_those_with_the_rounded_weight(layer, count, monkeypatch):
    x = torch.randn(2, count, K).bfloat16()
    with counted(monkeypatch, "qzo_multiply" if isinstance(layer, AwqLinear) else "qzo_multiply_by_row") as calls:
        y = layer(x)
    weight = part_of(layer, 0, N, dtype=torch.bfloat16).double()
    assert len(calls) == 1 and y.shape == (2, count, N)
    # sums in fp32 of terms as large as these, rounded to bf16 once
    bound = 2**-8 * (x.double() @ weight.t()).abs() + 1e-6 * (x.double().abs() @ weight.abs().t())
    assert ((y.double() - x.double() @ weight.t()).abs() <= bound).all()


@multiplies
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(layer):
    x, before = torch.randn(2, 9, K).bfloat16(), torch.get_num_threads()
    whole = layer(x)
    assert torch.equal(torch.stack([layer(part) for part in x]), whole) and torch.equal(layer(x[1, 3]), whole[1, 3])
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), whole)
    finally:
        torch.set_num_threads(before)


def test_a_change_of_the_scales_is_in_the_next_weight(layer):
    before = part_of(layer, 0, N, dtype=torch.float32)
    layer.scales.mul_(2)
    assert not torch.equal(part_of(layer, 0, N, dtype=torch.float32), before)


@multiplies
@pytest.mark.parametrize("name", ["scales", "zeros", "offsets"])
def test_products_read_numbers_of_any_dtype_where_they_are(name):
    """Of any stride or expansion, and of fp64 and int32 a copy in fp32."""
    whole, x = torch.arange(-6, 2).repeat(N, 1)[:, 1:7], torch.randn(3, K).bfloat16()  # exact in every dtype
    codes = torch.randint(256, (N, K // 2), dtype=torch.uint8)
    ones = torch.ones(N, 6)
    rows = by_row.Rows(codes, by_row.Order.HALVES, (N, K), ones, ones, ones, run_bytes=16)
    expected = by_row.multiply(rows._replace(**{name: whole.float()}), x)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64, torch.int32):
        numbers = whole.to(dtype)
        apart = torch.zeros(N, 6, 5, dtype=dtype)
        apart[..., 2] = numbers
        for same in (numbers, apart[..., 2], numbers.t().contiguous().t(), numbers[:1].expand(N, 6)):
            assert torch.equal(by_row.multiply(rows._replace(**{name: same}), x), expected)


def test_gradients_are_left_to_operators(layer):
    scales = layer.scales.detach().clone().requires_grad_()
    if isinstance(layer, GgufLinear):
        weight = layer.rows(0, N, torch.float32, scales, *layer.trained()[1:])
    else:
        weight = layer._rows(0, N, torch.float32, scales)
    weight.sum().backward()
    assert scales.grad is not None and scales.grad.any()


def test_fake_tensors_give_fake_ones():
    with FakeTensorMode():
        layer = GgufLinear.empty(K, N, TYPES["Q4_1"])
        assert layer(torch.empty(3, K, dtype=torch.bfloat16)).shape == (3, N)
        assert layer.rows(0, 7, torch.float32, *layer.trained()).shape == (7, K)


@pytest.mark.parametrize("make", [
    lambda: BnbLinear4bit.empty(96, 10, block_size=64),  # a block goes on in the next row
    lambda: BnbLinear8bit.empty(40, 10),  # a row is no whole number of runs
    lambda: AoInt8Linear.empty(96, 10, group_size=16),
    lambda: HqqLinear.empty(64, 8, 4, 128),  # a group goes on in the next row
])  # fmt: skip
def test_what_compiled_code_cannot_read_is_left_to_operators(make, monkeypatch):
    layer = make()
    for buffer in layer.buffers():
        nn.init.ones_(buffer)
    with counted(monkeypatch, "qzo_rebuild_by_row") as calls:
        assert part_of(layer, 1, 5, dtype=torch.float32).shape == (4, layer.in_features)
    assert not calls


def test_the_head_on_a_table_multiplies_as_a_layer_does(monkeypatch):
    kind = TYPES["Q8_0"]
    blocks = torch.randint(256, (N, K // 32, 34), dtype=torch.uint8)
    blocks.view(torch.float16)[..., 0] = 0.01
    table, layer = GgufEmbedding(blocks, kind, torch.float32), GgufLinear(blocks, kind)
    x = torch.randn(4, K)
    assert torch.equal(table.project(x), layer(x))
    torch.testing.assert_close(table.project(x), x @ table.whole().t())


def test_tensors_that_do_not_fit_are_refused():
    codes, scales = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1)
    rows = by_row.Rows(codes, by_row.Order.LOW_FIRST, (4, 32), scales)
    assert by_row.rebuild(rows, torch.float32).shape == (4, 32)
    for wrong in ({"shape": (4, 64)}, {"shape": (5, 32)}, {"scales": torch.ones(3, 1)}, {"zeros": torch.ones(4, 2)}):
        with pytest.raises(QzoError, match="do not fit a weight"):
            by_row.rebuild(rows._replace(**wrong), torch.float32)
    with pytest.raises(QzoError, match="table"):
        by_row.rebuild(rows._replace(table=torch.ones(8)), torch.float32)


@multiplies
def test_what_is_kept_is_not_rebuilt_by_a_product(monkeypatch):
    layer, x = BnbLinear8bit(torch.ones(N, K, dtype=torch.int8), torch.ones(N)), torch.randn(2, K).bfloat16()
    with counted(monkeypatch, "qzo_rebuild_by_row") as rebuilt, counted(monkeypatch, "qzo_multiply_by_row") as products:
        layer(x)
        with kept_weights():
            assert torch.equal(layer(x), layer(x))
    assert len(products) == 1 and len(rebuilt) == 1
