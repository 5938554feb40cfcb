"""Live modules of gptqmodel: packed by the library, taken over, trained, given back; see `make test-gptqmodel`."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("gptqmodel", reason="needs gptqmodel and the torch it asks for: make test-gptqmodel")
torch._dynamo.config.disable = True  # compiling takes seconds a layer

import awq_files  # noqa: E402
import standin  # noqa: E402
from gptq_files import from_words, to_words  # noqa: E402
from gptqmodel import BACKEND, GPTQModel  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_aten_kernel_awq import TorchAtenAwqLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_fused import TorchFusedLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_int8 import TorchInt8Linear  # noqa: E402
from gptqmodel.quantization import FORMAT  # noqa: E402
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq  # noqa: E402

from qzo import QZO, adopt, check_live, load, quantize, release, scales  # noqa: E402
from qzo.checkpoints.save import save  # noqa: E402
from qzo.errors import QzoError  # noqa: E402
from qzo.formats.awq.layer import AwqLinear, unpack  # noqa: E402
from qzo.formats.gptq.codes import unpack as unpack_words  # noqa: E402
from qzo.formats.gptq.layer import QuantLinear  # noqa: E402

ROWS, COLUMNS, GROUP = 96, 64, 32
CACHING = (TorchAtenLinear, TorchFusedLinear)


def ours(n_bits, act_order=False, symmetric=False):
    """A QuantLinear and the linear layer that the library packs to the same codes."""
    layer = QuantLinear.from_weight(torch.randn(ROWS, COLUMNS), torch.randn(ROWS).half(), n_bits, GROUP, symmetric)
    layer.scales = layer.scales.half()  # the library's dtype
    if act_order:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(COLUMNS)])
        layer.read_layout()
    linear = nn.Linear(COLUMNS, ROWS)
    linear.weight.data, linear.bias.data = layer.dequantize(), layer.bias.data.float()
    return layer, linear


def packed(layer, linear, kind=TorchLinear, pack="pack_original"):
    """A module of the library, packed by the library."""
    module = kind(layer.n_bits, GROUP, False, layer.act_order, COLUMNS, ROWS, bias=True)
    zeros, scale = layer.zero_points().t().float(), layer.scales.t().float()
    getattr(module, pack)(linear, scale.contiguous(), zeros.contiguous(), layer.g_idx)
    module.post_init()
    return module.eval()


def packed_awq(kind=AwqTorchLinear):
    """An AWQ module, packed by the library."""
    layer, linear = ours(4)
    module = kind(4, GROUP, False, False, COLUMNS, ROWS, bias=True, register_buffers=True)
    zeros, scale = layer.zero_points().t().float(), layer.scales.t().float()
    filler = AwqTorchLinear(4, GROUP, False, False, COLUMNS, ROWS, bias=True, register_buffers=True)
    filler.pack(linear, scale.contiguous(), zeros.contiguous())
    for name, tensor in filler.named_buffers():
        module.register_buffer(name, tensor.half() if tensor.is_floating_point() else tensor)
    module.post_init()
    return module.eval(), linear


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("pack", ["pack_original", "pack_block"])
def test_both_pack_the_same_words_and_read_the_same_weights(n_bits, act_order, pack):
    layer, linear = ours(n_bits, act_order)
    module = packed(layer, linear, pack=pack)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert torch.equal(getattr(module, name), getattr(layer, name)), name
    assert torch.equal(module.dequantize_weight().t(), layer.dequantize(torch.float16))
    words = module.qweight.numpy()
    assert (to_words(from_words(words, n_bits), n_bits) == words).all()  # what the cases of GPTQ are written with
    assert torch.equal(torch.from_numpy(from_words(words, n_bits)).int(), unpack_words(layer.qweight, n_bits))


def test_awq_words_are_those_of_the_library():
    codes, zeros = torch.randint(16, (COLUMNS, ROWS)), torch.randint(16, (COLUMNS // GROUP, ROWS))
    qweight, qzeros = pack_awq(codes, zeros, 4)
    assert torch.equal(unpack(qweight), codes.int()) and torch.equal(unpack(qzeros), zeros.int())
    assert torch.equal(qweight, awq_files.slow_words(codes.tolist()))
    layer = AwqLinear.empty(COLUMNS, ROWS, GROUP)
    layer.load_state_dict({"qweight": qweight, "qzeros": qzeros, "scales": torch.rand(COLUMNS // GROUP, ROWS).half()})
    expected = dequantize_gemm(qweight, qzeros, layer.scales, 4, GROUP)
    assert torch.equal(layer.dequantize(torch.float16), expected.t())


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_module_is_taken_over_on_its_tensors_and_given_back_tuned(n_bits, act_order):
    module = packed(*ours(n_bits, act_order))
    x, kept = torch.randn(3, COLUMNS).half(), copy.deepcopy(module.state_dict())
    model = nn.Sequential(module)
    expected = model(x)
    adopt(model)
    assert isinstance(model[0], QuantLinear) and model[0].act_order is act_order
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert getattr(model[0], name).data_ptr() == getattr(module, name).data_ptr(), name
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=2e-2)
    scales(model)["0.scales"].mul_(1.5)
    trained = model(x)
    release(model)
    assert model[0] is module
    torch.testing.assert_close(model(x), trained, rtol=1e-2, atol=2e-2)
    state = module.state_dict()
    assert {name for name in kept if not torch.equal(kept[name], state[name])} == {"scales"}


@pytest.mark.parametrize("kind", CACHING)
def test_a_kernel_that_keeps_a_copy_of_its_scales_is_taken_over_before_its_first_forward_only(kind):
    layer, linear = ours(4, symmetric=True)
    model, x = nn.Sequential(packed(layer, linear, kind)), torch.randn(3, COLUMNS).bfloat16()
    adopt(model)
    scales(model)["0.scales"].mul_(1.5)
    trained = model(x)
    release(model)
    assert type(model[0]) is kind
    torch.testing.assert_close(model(x).float(), trained.float(), rtol=3e-2, atol=1e-1)
    before = model(x)
    model[0].scales.mul_(2)  # the trap: the kernel does not see it
    assert torch.equal(model(x), before)
    message = (
        rf"^0: gptqmodel's kernel {kind.__name__} has repacked its qweight, and computes with a copy of its scales; "
    )
    with pytest.raises(QzoError, match=message + r"adopt the model before .*BACKEND.GPTQ_TORCH or .* qzo.load$"):
        adopt(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize("kind", [AwqTorchLinear, TorchAtenAwqLinear])
def test_awq_modules_are_taken_over_and_given_back(kind):
    module, linear = packed_awq(kind)
    model, x = nn.Sequential(module), torch.randn(3, COLUMNS).half()
    adopt(model)
    assert isinstance(model[0], AwqLinear)
    torch.testing.assert_close(model(x), linear(x.float()).half(), rtol=1e-2, atol=5e-2)
    scales(model)["0.scales"].mul_(1.5)
    trained = model(x)
    release(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-2, atol=5e-2)
    if kind is TorchAtenAwqLinear:
        with pytest.raises(QzoError, match=r"^0: gptqmodel's kernel TorchAtenAwqLinear has repacked its qweight"):
            adopt(model)
    else:
        adopt(model)


def test_scales_made_in_inference_mode_are_copied():
    module = packed(*ours(4), pack="pack_block")
    assert module.scales.is_inference()
    model, x = nn.Sequential(module), torch.randn(3, COLUMNS).half()
    expected = module(x)
    adopt(model)
    optimizer = QZO(scales(model), lr=1e-4)
    optimizer.step(lambda: model(x).float().square().mean())
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=0.2)
    scales(model)["0.scales"].mul_(1.5)
    trained = model(x)
    release(model)
    assert model[0] is module and not module.scales.is_inference()
    torch.testing.assert_close(model(x), trained, rtol=1e-2, atol=5e-2)


def test_layouts_that_are_not_known_are_refused():
    planar = TorchLinear(3, GROUP, False, False, COLUMNS, ROWS, bias=True, format=FORMAT.GPTQ_P)
    with pytest.raises(QzoError, match=r"^0: a TorchLinear with planar 3-bit codes cannot be taken over"):
        adopt(nn.Sequential(planar))
    other = TorchInt8Linear(8, GROUP, False, False, COLUMNS, ROWS, bias=True)
    with pytest.raises(QzoError, match=r"^0: the codes of gptqmodel's kernel TorchInt8Linear are not known here; load"):
        adopt(nn.Sequential(other))
    wide = AwqTorchLinear(8, GROUP, False, False, COLUMNS, ROWS, bias=True, register_buffers=True)
    with pytest.raises(QzoError, match=r"^0: a AwqTorchLinear with 8 bits cannot be taken over; AWQ needs 4"):
        adopt(nn.Sequential(wide))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("auto", [False, True])
def test_a_model_the_library_loaded_trains_and_what_it_saves_is_tuned(
    make_model, input_ids, tmp_path, family, kind, auto
):
    """`auto` lets the library choose its kernel: one that keeps a copy of the scales."""
    model = make_model(family, torch.float16)
    if kind == "awq":
        awq_files.write_awq(model, tmp_path / "model", GROUP)
    else:
        save(quantize(model, 4, GROUP, symmetric=kind == "gptq"), tmp_path / "model", checkpoint_format=kind)
    standin.write_tokenizer(tmp_path / "model")
    backend = BACKEND.AUTO if auto else BACKEND.AWQ_TORCH if kind == "awq" else BACKEND.GPTQ_TORCH
    live = GPTQModel.load(str(tmp_path / "model"), backend=backend, device="cpu", dtype=torch.float16)
    inner = adopt(live.model)

    def loss():
        return inner(input_ids, labels=input_ids).loss.float()

    own = load(tmp_path / "model", inner.dtype)
    torch.testing.assert_close(inner(input_ids).logits, own(input_ids).logits)
    assert scales(inner).keys() == scales(own).keys() and check_live(inner, loss)
    optimizer = QZO(scales(inner), lr=1e-4, relative=True, eps=1e-2)
    for _ in range(5):
        optimizer.step(loss)
    trained = inner(input_ids).logits.float()
    tuned = {name: scale.clone() for name, scale in scales(inner).items()}
    release(inner)
    if not auto:
        live.save(str(tmp_path / "tuned"))
        again = load(tmp_path / "tuned", inner.dtype)
        assert all(torch.equal(scale, tuned[name].to(scale.dtype)) for name, scale in scales(again).items())
    with torch.no_grad():
        torch.testing.assert_close(inner(input_ids).logits.float(), trained, rtol=0, atol=3e-2)
