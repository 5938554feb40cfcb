"""Compiled code against PyTorch's operators: weights of the same bits, products as exact, the rest left to them."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor

from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.kernels import native
from qzo.kernels.instructions import has_bf16

compiled = pytest.mark.skipif(not native.is_compiled(), reason="the package was installed without a compiler")
multiplies = pytest.mark.skipif(
    not native.is_compiled() or not native._panel_columns() or not has_bf16(),
    reason="needs compiled code, and a CPU with AVX512-BF16",
)
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def on_tiles_too():
    """A CPU with tiles has what compiled products need, though it prefers PyTorch's."""
    with native.products_on_tiles():
        yield


@contextmanager
def using(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def made(n_bits=4, group_size=32, symmetric=True, act_order=False, shape=(96, 64), dtype=torch.bfloat16):
    layer = QuantLinear.from_weight(torch.randn(shape, dtype=dtype), None, n_bits, group_size, symmetric)
    if act_order:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(layer.in_features)])
        layer.read_layout()
    return layer


def by_operators(layer, *rows, dtype):
    with native.by_operators():
        assert not native.can_rebuild(layer.qweight, layer.n_bits, layer.scales, dtype)
        return layer._rows(*rows, dtype, layer.scales)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    bits = torch.int16 if ours.dtype == torch.bfloat16 else torch.int32
    numbers = ~theirs.isnan()
    assert torch.equal(ours.isnan(), ~numbers)
    assert torch.equal(ours.view(bits)[numbers], theirs.view(bits)[numbers])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [(0, 96), (20, 53)])
def test_the_same_bits_as_operators(dtype, n_bits, symmetric, act_order, rows):
    layer = made(n_bits, 32, symmetric, act_order)
    assert native.can_rebuild(layer.qweight, n_bits, layer.scales, dtype)
    assert_same_bits(layer._rows(*rows, dtype, layer.scales), by_operators(layer, *rows, dtype=dtype))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_scales_of_every_kind(dtype, threads):
    """Any 32 bits that a scale may be made of: subnormal, negative, infinite and NaN, which must stay NaN."""
    layer = made(group_size=16, symmetric=False, shape=(1024, 128), dtype=torch.float32)  # enough for three threads
    layer.scales.view(torch.int32).random_(-(2**31), 2**31 - 1)
    layer.scales.view(torch.int32)[0, :4] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F7FFFFF], dtype=torch.int32)
    with using(threads):
        ours = layer._rows(0, 1024, dtype, layer.scales)
    assert_same_bits(ours, by_operators(layer, 0, 1024, dtype=dtype))


@multiplies
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (8, 48), (29, 160)])
def test_products_are_those_with_the_rounded_weight(n_bits, symmetric, act_order, rows, columns):
    columns += columns % (32 if n_bits == 3 else 1)  # whose zero points fill whole words
    layer = made(n_bits, 32, symmetric, act_order, (columns, 128))
    x = torch.randn(rows, 128).bfloat16()
    assert native.can_multiply(layer.qweight, n_bits, layer.scales, x)
    exact = x.double() @ layer.dequantize(torch.bfloat16).double().t()
    # sums in fp32 of 128 terms, rounded to bf16 once
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-5)


@multiplies
def test_a_row_depends_neither_on_the_others_nor_on_the_threads():
    layer, x = made(shape=(1000, 512)), torch.randn(3, 50, 512).bfloat16()
    whole = layer(x)
    assert whole.shape == (3, 50, 1000) and torch.equal(torch.stack([layer(part) for part in x]), whole)
    assert torch.equal(layer(x[:, ::7]), whole[:, ::7]) and torch.equal(layer(x[1, 3]), whole[1, 3])
    for threads in (1, 2, 3, 7):
        with using(threads):
            assert torch.equal(layer(x), whole)


@multiplies
def test_products_keep_nan_and_infinity():
    layer, x = made(shape=(64, 64)), torch.randn(3, 64).bfloat16()
    x[1, 5] = torch.nan
    layer.scales[1, 7] = torch.inf
    y = layer(x)
    assert y[1].isnan().all() and not y[[0, 2]].isfinite()[:, 7].any()
    assert y[[0, 2]][:, torch.arange(64) != 7].isfinite().all()


@multiplies
@pytest.mark.parametrize("awq", [False, True])
def test_products_read_scales_of_any_dtype_where_they_are(awq):
    """fp16, bf16 and fp32 as they are, fp64 and a transposed view as a copy; columns that fill no whole vector."""
    words = torch.randint(-(2**31), 2**31 - 1, (128, 7) if awq else (16, 56), dtype=torch.int32)
    scales, x = torch.rand(4, 56).half().bfloat16().half(), torch.randn(3, 128).bfloat16()  # exact in every dtype
    codes = native.Codes(words, 4, scales, 8, None, awq)
    expected = native.multiply(codes, x)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(native.multiply(codes._replace(scales=scales.to(dtype)), x), expected)
    assert torch.equal(native.multiply(codes._replace(scales=scales.t().contiguous().t()), x), expected)


@multiplies
def test_nothing_as_large_as_the_layer_is_born_in_a_product():
    layer, x = made(shape=(4096, 512)), torch.randn(4, 512).bfloat16()
    with using(2), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x)
    allocated = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    panels, y = 2 * 512 * 48 * 2, 2 * 4 * 4096
    assert sum(size for size in allocated if size > 0) == panels + y < 4096 * 512 * 2 / 2


@multiplies
def test_inputs_may_be_cut_out_of_larger_ones_or_be_none_at_all():
    layer, x = made(), torch.randn(6, 65).bfloat16()
    cut = x[::2, 1:]  # starts at an odd place
    assert torch.equal(layer(cut), layer(cut.clone())) and torch.equal(layer(x.t()[:64].t()), layer(x[:, :64].clone()))
    assert layer(x[:0, :64]).shape == (0, 96)


@multiplies
def test_products_with_gradients_are_left_to_operators():
    layer, x = made(), torch.randn(3, 64).bfloat16()
    assert not native.can_multiply(layer.qweight, 4, layer.scales, x.float())
    assert not native.can_multiply(layer.qweight, 4, layer.scales, x.clone().requires_grad_())
    layer.scales.requires_grad_()
    assert not native.can_multiply(layer.qweight, 4, layer.scales, x)
    with torch.no_grad():
        assert native.can_multiply(layer.qweight, 4, layer.scales, x)


def test_a_layer_answers_without_compiled_code(monkeypatch):
    layer, x = made(), torch.randn(3, 64).bfloat16()
    expected = layer(x)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not native.is_compiled()
    torch.testing.assert_close(layer(x), expected)


def test_a_library_that_cannot_be_loaded_counts_as_none(monkeypatch, tmp_path):
    (tmp_path / "_native.so").write_text("no library")
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".so"])
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.library.__wrapped__() is None


@compiled
def test_a_library_of_other_sources_counts_as_none(monkeypatch):
    monkeypatch.setattr(native.ctypes, "sizeof", lambda _: 8)
    assert native.library.__wrapped__() is None


def test_what_it_does_not_do_is_left_to_operators():
    words, scales = made().qweight, made().scales.float()
    assert native.can_rebuild(words, 4, scales, torch.float32) == native.is_compiled()
    assert not native.can_rebuild(words, 4, scales, torch.float16)
    assert not native.can_rebuild(words.to("meta"), 4, scales, torch.float32)
    assert not native.can_rebuild(words, 4, scales.to("meta"), torch.float32)
    assert not native.can_rebuild(words.long(), 4, scales, torch.float32)
    assert not native.can_rebuild(words, 4, scales.clone().requires_grad_(), torch.float32)
    assert not native.can_rebuild(words, 4, TwoTensor(scales, scales), torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scales, torch.ones_like(scales))
        assert not native.can_rebuild(words, 4, dual, torch.float32)


def test_a_tangent_of_the_scales_reaches_the_weights():
    layer = made(dtype=torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(layer.scales, layer.scales)
        value, tangent = forward_ad.unpack_dual(layer._rows(0, 96, torch.float32, dual))
    assert torch.equal(tangent, value)  # weights are linear in the scales


@pytest.mark.filterwarnings("ignore:Dynamo detected")
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_models_are_traced_through_operators(dtype):
    layer, x = made(dtype=dtype), torch.randn(3, 64, dtype=dtype)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(whole(x), layer(x), rtol=tolerance, atol=tolerance)


@multiplies
def test_products_of_a_cpu_with_tiles_are_pytorchs_unless_they_are_to_be_compared(monkeypatch):
    layer, x = made(), torch.randn(3, 64).bfloat16()
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    assert native.can_multiply(layer.qweight, 4, layer.scales, x)
    monkeypatch.setattr(native, "_on_tiles", False)
    assert not native.can_multiply(layer.qweight, 4, layer.scales, x)
    assert native.can_rebuild(layer.qweight, 4, layer.scales, x.dtype)
    by_pytorch = layer(x)
    with native.products_on_tiles():
        torch.testing.assert_close(layer(x), by_pytorch)


@compiled
def test_fake_tensors_give_a_fake_weight():
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        layer = QuantLinear.empty(64, 96, group_size=32)
        layer.zero = 8
        weight = layer._rows(0, 96, torch.bfloat16, layer.scales)
        y = layer(torch.empty(2, 5, 64, dtype=torch.bfloat16))
    assert weight.fake_mode is mode and weight.shape == (96, 64) and weight.stride() == (1, 96)
    assert y.fake_mode is mode and y.shape == (2, 5, 96)


@compiled
@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1])
def test_a_group_that_does_not_exist_is_refused(group):
    layer = made(act_order=True)
    layer.g_idx[5] = group
    with pytest.raises(QzoError, match=r"outside 0 \.\.\. 1"):
        layer.dequantize()
    if native.can_multiply(layer.qweight, 4, layer.scales, torch.empty(1, 64).bfloat16()):
        with pytest.raises(QzoError, match=r"outside 0 \.\.\. 1"):
            layer(torch.randn(1, 64).bfloat16())


@compiled
def test_shapes_that_do_not_fit_are_refused():
    layer = made(symmetric=False, act_order=True)
    codes = layer._codes(0, 96, layer.scales)
    for wrong in ({"scales": codes.scales[:, :95]}, {"scales": codes.scales[:0]}, {"zeros": codes.zeros[:1]}):
        with pytest.raises(QzoError, match=r"do not fit a weight \[96, 64\]"):
            native.rebuild(codes._replace(**wrong), torch.float32)
    with pytest.raises(QzoError, match=r"g_idx has shape \(63,\)"):
        native.rebuild(codes._replace(g_idx=codes.g_idx[1:]), torch.float32)


@compiled
def test_groups_and_zero_points_may_be_of_other_integer_types():
    layer = made(symmetric=False, act_order=True)
    expected = layer.dequantize()
    layer.g_idx, zeros = layer.g_idx.long(), layer.zero_points()
    layer.zero_points = lambda *columns: zeros.to(torch.int16)
    assert torch.equal(layer.dequantize(), expected)


@compiled
def test_tensors_may_be_transposed_views():
    layer = made()
    expected = layer.dequantize()
    layer.qweight, layer.scales = layer.qweight.t().contiguous().t(), layer.scales.t().contiguous().t()
    assert torch.equal(layer.dequantize(), expected)
