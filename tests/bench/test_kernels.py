"""Rules for what CUDA does differently from meta, and autocast by hand."""

import pytest
import torch
import torch.nn.functional as F

from bench import gpus
from bench.attention import attend
from bench.autocast import MetaAutocast
from bench.kernels import CUBLAS_WORKSPACE_BYTES, HOPPER_WORKSPACE_BYTES, CudaFunctions, rules
from bench.ledger import Ledger


def simulated(gpu: str = "rtx-4090") -> Ledger:
    return Ledger("meta", 512, rules(gpus.get(gpu), experts=8))


@pytest.mark.parametrize(
    ("gpu", "workspace"), [("rtx-4090", CUBLAS_WORKSPACE_BYTES), ("h100-80gb", HOPPER_WORKSPACE_BYTES)]
)
def test_each_thread_gets_one_cublas_workspace(gpu, workspace):
    weight = torch.empty(64, 64, device="meta", requires_grad=True)
    with simulated(gpu) as ledger:
        (torch.empty(8, 64, device="meta") @ weight).sum()
        (torch.empty(8, 64, device="meta") @ weight).sum()
        assert ledger.live_bytes() == workspace
        (torch.empty(8, 64, device="meta") @ weight).sum().backward()
        assert ledger.live_bytes() == 2 * workspace + weight.grad.nbytes


def test_items_of_empty_tensors_can_be_read():
    with simulated():
        assert bool(torch.empty(3, dtype=torch.bool, device="meta").all()) is True
        assert torch.empty((), device="meta").item() == 0.0
        assert torch.empty((), dtype=torch.long, device="meta").item() == 0


def test_experts_get_an_even_share_of_the_tokens():
    with simulated():
        assert torch.nonzero(torch.empty(128, 2, dtype=torch.bool, device="meta")).shape == (32, 2)
        assert torch.nonzero(torch.empty(1, 2, dtype=torch.bool, device="meta")).shape == (1, 2)


def q(heads: int = 4, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> torch.Tensor:
    return torch.empty(2, heads, 128, head_dim, device="meta", dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_no_attention_kernel_makes_a_score_matrix(kernel):
    with simulated() as ledger, CudaFunctions(kernel):
        out = F.scaled_dot_product_attention(q(), q(), q(), is_causal=True)
        out.sum().backward()
    scores = 2 * 4 * 128 * 128 * 2
    assert all(block.nbytes != scores for block in (event.block for event in ledger.events))
    assert out.shape == (2, 4, 128, 64)


def test_flash_takes_grouped_heads_as_they_are_and_efficient_repeats_them():
    key = q(heads=2)
    with simulated() as ledger:
        attend("flash", q(), key, key, is_causal=True, enable_gqa=True)
    flash = ledger.peak_bytes()
    with simulated() as ledger:
        attend("efficient", q(), key, key, is_causal=True, enable_gqa=True)
    assert ledger.peak_bytes() > flash


@pytest.mark.parametrize("odd", [{"dtype": torch.float32}, {"head_dim": 264}])
def test_what_flash_cannot_take_goes_to_the_efficient_kernel(odd):
    assert attend("flash", q(**odd), q(**odd), q(**odd)).shape == q(**odd).shape


def test_a_head_that_is_no_multiple_of_eight_is_padded_for_flash():
    assert attend("flash", q(head_dim=60), q(head_dim=60), q(head_dim=60)).shape[-1] == 60


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
