"""Rules for what CUDA does differently from meta, and autocast by hand."""

import pytest
import torch
import torch.nn.functional as F

from bench.cases import gpus
from bench.ledger.ledger import Ledger
from bench.simulator.cuda.autocast import MetaAutocast
from bench.simulator.cuda.kernels import CudaFunctions, rules
from qzo.kernels.philox import BITS, Stream, draw_by_operators


def simulated(gpu: str = "rtx-4090") -> Ledger:
    return Ledger("meta", 512, rules(gpus.get(gpu), experts=8))


def test_items_of_empty_tensors_can_be_read():
    with simulated():
        assert bool(torch.empty(3, dtype=torch.bool, device="meta").all()) is True
        assert torch.empty((), device="meta").item() == 0.0
        assert torch.empty((), dtype=torch.long, device="meta").item() == 0


def test_experts_get_an_even_share_of_the_tokens():
    with simulated():
        assert torch.nonzero(torch.empty(128, 2, dtype=torch.bool, device="meta")).shape == (32, 2)
        assert torch.nonzero(torch.empty(1, 2, dtype=torch.bool, device="meta")).shape == (1, 2)


def sizes(ledger: Ledger) -> list[int]:
    """What was allocated, in order, as the allocator counts it."""
    return [event.block.nbytes for event in ledger.events if event.sign > 0]


def test_layer_norm_keeps_its_statistics_in_fp32():
    x = torch.empty(4, 256, device="meta", dtype=torch.bfloat16)
    with simulated() as ledger:
        F.layer_norm(x, (256,))
    assert sizes(ledger) == [4 * 256 * 2, 512, 512]
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, (256,), None, None, 1e-5)
    assert mean.dtype is rstd.dtype is torch.float32


def test_cross_entropy_makes_log_probabilities_a_loss_and_a_weight():
    logits = torch.empty(64, 1000, device="meta", requires_grad=True)
    labels = torch.empty(64, dtype=torch.long, device="meta")
    with simulated() as ledger:
        loss = F.cross_entropy(logits, labels)
        assert sizes(ledger) == [256_000, 512, 512]
        torch.autograd.grad(loss, logits)
    assert sizes(ledger)[3:] == [512, 256_000, 256_000]  # 1.0, then the gradients of log-probabilities and logits


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, [8192]), (torch.bfloat16, [8192, 8192])])
def test_softmax_of_fp16_in_fp32_needs_no_cast_first(dtype, expected):
    scores = torch.empty(2, 1024, device="meta", dtype=dtype)
    with simulated() as ledger, CudaFunctions("flash"):
        F.softmax(scores, dim=-1, dtype=torch.float32)
    assert sizes(ledger) == expected


def embedding_gradient(tokens: int, rows: int = 5000, width: int = 64) -> Ledger:
    grad = torch.empty(tokens, width, device="meta", dtype=torch.bfloat16)
    indices = torch.empty(tokens, dtype=torch.long, device="meta")
    with simulated() as ledger:
        torch.ops.aten.embedding_dense_backward(grad, indices, rows, -1, False)
    return ledger


def test_few_embedding_indices_are_added_without_a_temporary():
    assert sizes(embedding_gradient(3072)) == [5000 * 64 * 2]


def test_many_embedding_indices_are_sorted_and_summed_by_tens_in_fp32():
    assert sizes(embedding_gradient(4096)) == [
        *[4096 * 8] * 5,  # sorted, original; range, and CUB's copies of keys and values
        5000 * 64 * 2,  # the gradient
        4096 * 8, 4096 * 8, 4096 * 8,  # where rows begin; sums of each row, and where they begin
        36_352, 1_153_536,  # where sums begin (409 + 4,096 of 8 bytes), the sums (256 bytes each)
    ]  # fmt: skip
    fewer_rows = embedding_gradient(8192, rows=100)
    assert max(sizes(fewer_rows)) == 235_520  # (819 + 100) sums, no more rows than the table has


def test_dropout_keeps_a_bool_mask_and_is_nothing_in_evaluation():
    x = torch.empty(1024, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with simulated() as ledger, CudaFunctions("flash"):
        out = F.dropout(x, 0.1)
        sizes = sorted(event.block.nbytes for event in ledger.events)
        assert sizes == [1024, 2048]
        assert F.dropout(x, 0.1, training=False) is x
    assert out.shape == x.shape


def test_autocast_casts_a_weight_once_and_products_are_bf16():
    weight = torch.empty(64, 32, device="meta", requires_grad=True)
    x = torch.empty(8, 32, device="meta")
    with MetaAutocast() as autocast:
        assert F.linear(x, weight).dtype is torch.bfloat16
        F.linear(x, weight)
        assert len(autocast._copies) == 1
        assert F.softmax(torch.empty(8, 8, device="meta", dtype=torch.bfloat16), dim=-1).dtype is torch.float32
    assert not autocast._copies
    assert F.linear(x, weight).dtype is torch.float32


def test_autocast_agrees_with_pytorchs_own_on_the_cpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    x = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    with MetaAutocast():
        found = model(x)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)


def test_autocast_reaches_the_products_of_an_einsum():
    with MetaAutocast():
        half, full = torch.empty(2, 3, dtype=torch.bfloat16, device="meta"), torch.empty(3, 4, device="meta")
        assert torch.einsum("ab,bc->ac", half, full).dtype is torch.bfloat16


@pytest.mark.parametrize("distribution", BITS)
@pytest.mark.parametrize(("start", "numel"), [(0, 2**18), (0, 300_001), (5, 1000)])
def test_z_of_philox_by_operators_takes_what_it_does_where_it_is_drawn(distribution, start, numel):
    """No more than is documented, and as much on a GPU, without data, as with it."""
    peaks = []
    for seen, device in ((Ledger("cpu", 512), "cpu"), (simulated(), "meta")):
        with seen:
            draw_by_operators(torch.empty(numel, device=device), start, Stream(0, 0, 0, 0), distribution)
        peaks.append(seen.peak_bytes() - 4 * numel)
    assert abs(peaks[0] - peaks[1]) <= 512 and peaks[0] <= 3.6 * 2**20
