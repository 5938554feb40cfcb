"""Workspaces of matrix products, and NF4 weights that are unpacked first."""

import pytest
import torch
import torch.nn.functional as F

from bench.cases import gpus
from bench.ledger.ledger import Ledger
from bench.simulator.cuda.kernels import rules
from bench.simulator.cuda.products import CUBLAS_WORKSPACE_BYTES, CUBLASLT_WORKSPACE_BYTES, HOPPER_WORKSPACE_BYTES


def simulated(gpu: str = "rtx-4090") -> Ledger:
    return Ledger("meta", 512, rules(gpus.get(gpu)))


def sizes(ledger: Ledger) -> list[int]:
    return [event.block.nbytes for event in ledger.events if event.sign > 0]


def test_the_sizes_are_those_of_the_source():
    assert CUBLAS_WORKSPACE_BYTES == 8_519_680  # what torch.cuda.memory_allocated shows after one product
    assert HOPPER_WORKSPACE_BYTES == 33_554_432
    assert CUBLASLT_WORKSPACE_BYTES == 1_048_576


@pytest.mark.parametrize(
    ("gpu", "workspace"),
    [
        ("t4", CUBLAS_WORKSPACE_BYTES), ("rtx-4090", CUBLAS_WORKSPACE_BYTES), ("h100-80gb", HOPPER_WORKSPACE_BYTES),
        ("rtx-5090", HOPPER_WORKSPACE_BYTES),
    ],
)  # fmt: skip
def test_each_thread_gets_one_cublas_workspace(gpu, workspace):
    weight = torch.empty(64, 64, device="meta", requires_grad=True)
    with simulated(gpu) as ledger:
        (torch.empty(8, 64, device="meta") @ weight).sum()
        (torch.empty(8, 64, device="meta") @ weight).sum()
        assert ledger.live_bytes() == workspace
        (torch.empty(8, 64, device="meta") @ weight).sum().backward()
        assert ledger.live_bytes() == 2 * workspace + weight.grad.nbytes


def test_a_product_into_a_given_tensor_needs_the_workspace_too():
    x, weight, out = (torch.empty(64, 64, device="meta") for _ in range(3))
    with simulated() as ledger:
        torch.mm(x, weight, out=out)
    assert sizes(ledger) == [out.nbytes, CUBLAS_WORKSPACE_BYTES]


@pytest.mark.parametrize(("rows", "fused"), [(8, True), (1, False)])
def test_a_bias_goes_through_cublaslt_which_has_a_workspace_of_its_own(rows, fused):
    x, weight, bias = (
        torch.empty(rows, 64, device="meta"),
        torch.empty(32, 64, device="meta"),
        torch.empty(32, device="meta"),
    )
    with simulated() as ledger:
        F.linear(x, weight, bias)
        F.linear(x, weight, bias)
    assert sizes(ledger).count(CUBLASLT_WORKSPACE_BYTES) == int(fused)
    assert sizes(ledger).count(CUBLAS_WORKSPACE_BYTES) == 1


def test_a_product_without_a_bias_needs_no_cublaslt():
    with simulated() as ledger:
        F.linear(torch.empty(8, 64, device="meta"), torch.empty(32, 64, device="meta"))
    assert CUBLAS_WORKSPACE_BYTES in sizes(ledger) and CUBLASLT_WORKSPACE_BYTES not in sizes(ledger)


@pytest.mark.parametrize(("rows", "unpacked"), [(65, True), (64, False)])
def test_an_nf4_weight_is_unpacked_for_more_than_a_few_rows(rows, unpacked):
    pytest.importorskip("bitsandbytes")
    x = torch.empty(rows, 256, device="meta", dtype=torch.bfloat16)
    packed, absmax = torch.empty(128 * 128, 1, dtype=torch.uint8, device="meta"), torch.empty(512, device="meta")
    with simulated() as ledger:
        out = torch.ops.bitsandbytes.gemm_4bit.default(x, packed, [128, 256], absmax, 64, "nf4")
    weight, result = 128 * 256 * 2, rows * 128 * 2
    assert sizes(ledger) == ([weight, -(-result // 512) * 512, CUBLAS_WORKSPACE_BYTES] if unpacked else [result])
    assert out.shape == (rows, 128)
