"""Every format, and the optimizers, on a GPU beside the CPU. Run by `make gpu`."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from bench.cases.quantizations import FORMATS, quantize_as
from qzo.errors import QzoError
from qzo.kernels.philox import Stream, draw

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
pytestmark = [pytest.mark.cuda, needs_gpu]
LR = 3e-7
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}


def tiny(dtype=torch.float32, name=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    if name is not None:
        try:
            quantize_as(model, name, embeddings=True)
        except (ImportError, QzoError) as error:
            pytest.skip(str(error))
    return model


def tokens(device="cpu"):
    return torch.randint(320, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)


def difference(found, expected):
    """‖found - expected‖ / ‖expected‖, in double precision."""
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_computes_what_it_does_on_the_cpu(name, dtype):
    on_cpu = tiny(dtype, name)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    logits, grads = {}, {}
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        inputs = model.get_input_embeddings()(tokens(device)).detach().requires_grad_()
        logits[device] = model(inputs_embeds=inputs).logits
        logits[device].float().square().mean().backward()
        grads[device] = inputs.grad
    assert difference(logits["cuda"], logits["cpu"]) < TOLERANCE[dtype]
    assert difference(grads["cuda"], grads["cpu"]) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quantizing_on_the_gpu_gives_the_codes_of_the_cpu(dtype):
    on_cpu, on_gpu = tiny(dtype), tiny(dtype).cuda()
    for model in (on_cpu, on_gpu):
        qzo.quantize(model, n_bits=4, group_size=32)
    expected = dict(on_cpu.named_buffers())
    for name, buffer in on_gpu.named_buffers():
        assert torch.equal(buffer.cpu(), expected[name]), name


def stepping(dtype):
    """Model, losses and d' of three steps."""
    model = tiny(dtype, "gptq").cuda()
    optimizer = qzo.QZO(qzo.scales(model), lr=LR, seed=0)
    ids, losses, applied = tokens("cuda"), [], []
    for _ in range(3):
        losses.append(optimizer.step(lambda: qzo.label_loss(model, ids, ids)))
        applied.append(optimizer.last.applied)
    return model, losses, applied


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_give_the_same_bits_again_and_a_replay_too(dtype):
    trained, losses, applied = stepping(dtype)
    again, same_losses, _ = stepping(dtype)
    replayed = tiny(dtype, "gptq").cuda()
    optimizer = qzo.QZO(qzo.scales(replayed), lr=LR, seed=0)
    for derivatives in applied:
        optimizer.replay(derivatives)
    assert losses == same_losses
    for name, scale in qzo.scales(trained).items():
        assert torch.equal(scale, qzo.scales(again)[name]), name
        assert torch.equal(scale, qzo.scales(replayed)[name]), name


@pytest.mark.parametrize("distribution", ["binomial", "rademacher"])
def test_z_of_philox_is_that_of_the_cpu_to_the_bit(distribution):
    for start, numel in ((0, 5001), (2**33 + 17, 300_000)):
        ours, theirs = (torch.empty(numel, device=device) for device in ("cuda", "cpu"))
        for z in (ours, theirs):
            draw(z, start, Stream(2**63 + 5, 7, 3, 1), distribution)
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_a_journal_of_the_gpu_replays_on_the_cpu_to_the_bit(method, tmp_path):
    def made(device):
        model = tiny(torch.bfloat16, "gptq" if method == "qzo" else None).to(device).requires_grad_(False)
        if method == "qzo":
            return model, qzo.QZO(qzo.scales(model), lr=LR, noise="philox", momentum=0.9, directions=2)
        return model, qzo.MeZO(model.named_parameters(), noise="philox", directions=2)

    model, optimizer = made("cuda")
    ids = tokens("cuda")
    with qzo.Journal(tmp_path / "j", model, optimizer) as journal:
        for _ in range(4):
            optimizer.step(lambda: qzo.label_loss(model, ids, ids))
            journal.record()
    again, _ = qzo.replay(made("cpu")[0], tmp_path / "j")
    assert all(torch.equal(value, optimizer.truth()[name].cpu()) for name, value in again.truth().items())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_a_step_that_is_left_out_puts_every_bit_back(method, dtype):
    model = tiny(dtype, "gptq" if method == "qzo" else None).cuda().requires_grad_(False)
    trained = qzo.scales(model) if method == "qzo" else dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in trained.items()}
    optimizer = qzo.QZO(trained) if method == "qzo" else qzo.MeZO(trained, exact=True)
    optimizer.step(lambda: math.nan)
    assert optimizer.last.skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.items())


def test_training_on_the_gpu_lowers_the_loss():
    model = tiny(name="gptq").cuda()
    optimizer = qzo.QZO(qzo.scales(model), lr=LR, seed=0)
    ids = tokens("cuda")

    @torch.no_grad()
    def loss():
        return qzo.label_loss(model, ids, ids)

    before = float(loss())
    for _ in range(200):
        optimizer.step(loss)
    assert float(loss()) < 0.97 * before  # on the CPU 0.95, whatever the seed


def test_a_step_leaves_the_global_generators_alone():
    state = torch.cuda.get_rng_state()
    stepping(torch.bfloat16)
    after = torch.cuda.get_rng_state()
    assert torch.equal(state, after)
