"""Which attention kernel runs, and what each holds."""

import pytest
import torch
import torch.nn.functional as F

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.models import resolve
from bench.ledger.ledger import Ledger
from bench.simulator.cuda.attention import Call, attention_of, choose_backend, preference
from bench.simulator.cuda.attention_kernels import attend
from bench.simulator.cuda.attention_temporaries import backward_block, key_splits
from bench.simulator.cuda.kernels import CudaFunctions, rules
from qzo.errors import QzoError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
T4, A100, RTX3090, RTX4090, H100 = (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)


def simulated(gpu: str = "rtx-4090") -> Ledger:
    return Ledger("meta", 512, rules(gpus.get(gpu)))


def sizes(ledger: Ledger) -> list[int]:
    return [event.block.nbytes for event in ledger.events if event.sign > 0]


def q(heads: int = 4, dtype: torch.dtype = BF16, head_dim: int = 64, tokens: int = 128) -> torch.Tensor:
    """[2, heads, tokens, head_dim], laid out as a model does it."""
    shape = (2, tokens, heads, head_dim)
    return torch.empty(shape, device="meta", dtype=dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize(
    ("gpu", "call", "kernel"),
    [
        (A100, Call(BF16, 128), "flash"),
        (A100, Call(FP32, 128), "efficient"),
        (A100, Call(BF16, 128, mask=True), "efficient"),
        (A100, Call(BF16, 256), "flash"),
        (A100, Call(BF16, 264), "efficient"),
        (A100, Call(BF16, 260), "math"),  # too wide for flash, and 8 bytes short of the efficient kernel's alignment
        (A100, Call(BF16, 60), "flash"),  # padded
        (A100, Call(BF16, 60, mask=True), "math"),
        (A100, Call(FP32, 60), "efficient"),
        (A100, Call(BF16, 192, value_dim=128), "efficient"),  # latent attention
        (A100, Call(BF16, 128, value_dim=128), "flash"),
        (A100, Call(BF16, 128, grouped=True), "flash"),
        (A100, Call(FP32, 128, grouped=True), "math"),
        (A100, Call(BF16, 128, causal=True, queries=1, keys=128), "efficient"),
        (A100, Call(BF16, 224, requires_grad=True), "flash"),
        (RTX3090, Call(BF16, 224), "flash"),
        (RTX3090, Call(BF16, 224, requires_grad=True), "efficient"),
        (RTX4090, Call(BF16, 256, requires_grad=True), "flash"),
        (RTX4090, Call(BF16, 256, requires_grad=True, dropout=0.1), "efficient"),
        (RTX4090, Call(BF16, 192, requires_grad=True, dropout=0.1), "flash"),
        ((12, 0), Call(BF16, 224, requires_grad=True), "efficient"),
        (T4, Call(FP16, 128), "efficient"),
        (T4, Call(BF16, 128), "math"),
        (T4, Call(FP32, 61), "efficient"),
        (T4, Call(FP16, 61), "math"),
        (H100, Call(BF16, 128), "cudnn"),
        (H100, Call(BF16, 128, dropout=0.1), "flash"),
        (H100, Call(BF16, 128, dropout=0.125), "cudnn"),
        (H100, Call(BF16, 256), "flash"),
        (H100, Call(BF16, 128, mask=True, grouped=True), "cudnn"),
    ],
)  # fmt: skip
def test_the_kernel_is_the_one_pytorch_chooses(gpu, call, kernel):
    assert choose_backend(gpu, call) == kernel


def test_a_preferred_kernel_comes_before_pytorchs_order():
    assert preference(H100, "flash") == ("flash", "cudnn", "efficient", "math")
    assert choose_backend(H100, Call(BF16, 128), "flash") == "flash"
    assert choose_backend(A100, Call(BF16, 128), "math") == "math"
    assert choose_backend(A100, Call(BF16, 128, mask=True), "flash") == "efficient"


@pytest.mark.parametrize(
    ("gpu", "model", "asked", "found"),
    [
        (A100, "llama2-7b", None, "flash"), (T4, "llama2-7b", None, "math"), (None, "llama2-7b", None, "flash"),
        (A100, "llama2-7b", "eager", "eager"), (A100, "gemma2-2b", None, "eager"), (T4, "llama2-7b", "math", "math"),
        (A100, "llama2-7b", "cudnn", "cudnn"),
    ],
)  # fmt: skip
def test_a_case_gets_what_it_asks_for_or_what_its_gpu_runs(gpu, model, asked, found):
    assert attention_of(BenchCase(model, "lora", attention=asked), resolve(model), gpu) == found


@pytest.mark.parametrize(
    ("gpu", "model", "asked", "message"),
    [
        (
            T4,
            "llama2-7b",
            "flash",
            "flash attention needs a GPU of compute capability 8.0 or more.*choose math or eager",
        ),
        (T4, "llama2-7b", "efficient", "efficient attention needs compute capability 8.0 or more for bf16"),
        (T4, "llama2-7b", "cudnn", "cudnn attention needs"),
        (A100, "gemma2-2b", "flash", "choose eager"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_in_one_line(gpu, model, asked, message):
    with pytest.raises(QzoError, match=message) as caught:
        attention_of(BenchCase(model, "lora", attention=asked), resolve(model), gpu)
    assert "\n" not in str(caught.value)


def test_a_dtype_that_the_asked_kernel_cannot_take_is_refused_where_it_was_asked_for():
    wide = q(dtype=FP32)
    with pytest.raises(QzoError, match="flash attention needs fp16 or bf16, not float32 with heads of 64"):
        attend("flash", wide, wide, wide, gpu=A100, strict=True)
    assert attend("flash", wide, wide, wide, gpu=A100).shape == wide.shape


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_no_fused_kernel_makes_a_score_matrix(kernel):
    with simulated() as ledger, CudaFunctions(kernel):
        out = F.scaled_dot_product_attention(q(tokens=192), q(tokens=192), q(tokens=192), is_causal=True)
        out.sum().backward()
    scores = 2 * 4 * 192 * 192
    assert scores * 2 not in sizes(ledger) and scores * 4 not in sizes(ledger)
    assert out.shape == (2, 4, 192, 64)


def test_flash_takes_grouped_heads_as_they_are_and_efficient_repeats_them():
    key = q(heads=2)
    with simulated() as ledger:
        attend("flash", q(), key, key, is_causal=True, enable_gqa=True)
    flash = ledger.peak_bytes()
    with simulated() as ledger:
        attend("efficient", q(), key, key, is_causal=True, enable_gqa=True)
    assert ledger.peak_bytes() > flash


@pytest.mark.parametrize("odd", [{"dtype": FP32}, {"head_dim": 264}])
def test_what_flash_cannot_take_goes_to_the_efficient_kernel(odd):
    assert attend("flash", q(**odd), q(**odd), q(**odd)).shape == q(**odd).shape


def test_values_narrower_than_queries_go_to_the_efficient_kernel_and_keep_their_width():
    ran: set[str] = set()
    with torch.no_grad():
        out = attend("flash", q(head_dim=192), q(head_dim=192), q(head_dim=128), is_causal=True, ran=ran)
    assert ran == {"efficient"}
    assert out.shape == (2, 4, 128, 128)


def test_a_head_that_is_no_multiple_of_eight_is_padded_for_flash():
    assert attend("flash", q(head_dim=60), q(head_dim=60), q(head_dim=60)).shape[-1] == 60


def test_math_holds_fp32_copies_and_scores():
    x = q(tokens=96)
    rows, scores = 2 * 4 * 96, 2 * 4 * 96 * 96
    with simulated() as ledger, torch.no_grad(), CudaFunctions("math"):
        F.scaled_dot_product_attention(x, x, x)
    wide = rows * 64 * 4
    assert sizes(ledger)[:5] == [wide] * 5  # q, k and v in fp32, and q and k times the root of the scale
    assert sizes(ledger).count(scores * 4) == 2  # the scores, and their softmax
    with simulated() as ledger, torch.no_grad():
        attend("math", x, x, x, is_causal=True)
    assert 96 * 96 * 4 in sizes(ledger)  # the causal mask, added to the scores in place
    assert sizes(ledger).count(scores * 4) == 2


def test_a_bool_mask_becomes_one_of_numbers_padded_to_eight():
    x = q(tokens=100)
    mask = torch.empty(2, 1, 100, 100, dtype=torch.bool, device="meta")
    with simulated() as ledger, torch.no_grad():
        attend("efficient", x, x, x, attn_mask=mask)
    assert sizes(ledger)[2:4] == [40_448, 41_984]  # 2 x 100 x 100 in bf16, then 2 x 100 x 104 (41,600 bytes)


def test_efficient_attention_pads_its_row_sums_only_to_train():
    x = q(tokens=100)
    with simulated() as ledger:
        attend("efficient", x, x, x)
    assert 2 * 4 * 128 * 4 in sizes(ledger)  # 100 queries rounded up to a multiple of 32
    with simulated() as ledger, torch.no_grad():
        attend("efficient", x, x, x)
    assert 2 * 4 * 128 * 4 not in sizes(ledger)


def backward_sizes(kernel: str, gpu: str, query: torch.Tensor, key: torch.Tensor) -> list[int]:
    with simulated(gpu) as ledger, CudaFunctions(kernel, gpus.get(gpu).compute_capability):
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=grouped)
        start = len(sizes(ledger))
        out.backward(torch.empty_like(out))
    return sizes(ledger)[start:]


def test_flash_backward_accumulates_in_fp32_for_128_queries_at_a_time():
    rows = 2 * 4 * 256  # 130 tokens rounded up
    found = backward_sizes("flash", "a100-80gb", q(tokens=130), q(tokens=130))
    assert rows * 4 in found and rows * 64 * 4 in found


def test_flash_backward_of_shared_heads_has_gradients_for_each_query_head():
    found = backward_sizes("flash", "a100-80gb", q(), q(heads=2))
    wide, shared = 2 * 4 * 128 * 64 * 2, 2 * 2 * 128 * 64 * 2
    # the gradient given, those of q, k and v; row sums, q's in fp32, k's and v's for each query head; k is v here
    assert found == [wide, wide, shared, shared, 4096, 2 * wide, wide, wide, shared]


@pytest.mark.parametrize(
    ("gpu", "query", "workspace"),
    [
        ("t4", {"dtype": FP16}, 2 * 4 * 2 * (64 * 64 + 4) * 4),
        ("a100-80gb", {}, 2 * 4 * 2 * (64 * 64 + 4) * 4),
        ("a100-80gb", {"head_dim": 128}, 2 * 4 * 1 * (128 * 128 + 4) * 4),
        # 25 parts would be allowed for keys, and there are two blocks of 64: k and v, [2 x 128, 128] each
        ("rtx-4090", {"head_dim": 128}, 2 * 4 * (4 * (64 * 64 + 4) + 2 * 2 * 128 * 128) * 4),
    ],
)
def test_efficient_backward_has_a_workspace_for_what_registers_cannot_hold(gpu, query, workspace):
    found = backward_sizes("efficient", gpu, q(**query), q(**query))
    assert max(found) == -(-workspace // 512) * 512


def test_efficient_backward_of_fp32_multiplies_output_and_gradient_first():
    found = backward_sizes("efficient", "a100-80gb", q(dtype=FP32), q(dtype=FP32))
    wide, rows = 2 * 4 * 128 * 64 * 4, 2 * 4 * 128 * 4
    # the gradient given, those of q, k and v; product and row sums, row sums and workspace; k is v here
    assert found == [*[wide] * 4, wide, rows, rows, 262_656, wide]


def test_blocks_that_fit_in_registers_need_no_workspace_for_keys():
    assert backward_block(RTX3090, BF16, 96) == (128, 64, True)
    assert backward_block(A100, BF16, 256) == (128, 64, False)
    assert backward_block(A100, FP32, 256) == (128, 64, True)


def test_keys_are_split_as_the_sources_example_says():
    assert key_splits(48, 108, 16) == 2  # 48 blocks on 108 multiprocessors: 0.89 of them busy with two parts
    assert key_splits(96, 108, 16) == 1  # nearly all are busy
    assert key_splits(1, 108, 1) == 1


def test_flash_of_few_heads_keeps_the_output_of_each_part_of_the_keys():
    x = torch.empty(1, 1, 64, 64, device="meta", dtype=BF16)
    keys = torch.empty(1, 1, 4096, 64, device="meta", dtype=BF16)
    with simulated("rtx-4090") as ledger:
        attend("flash", x, keys, keys)
    splits = key_splits(1, 256, 16)
    assert splits == 16 and sizes(ledger)[-2:] == [splits * 64 * 4, splits * 64 * 64 * 4]
