"""AQLM models: folders read, trained and written back, modules of the library taken over and given back."""

import sys
import types

import cases_aqlm
import pytest
import standin
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import qzo
from qzo import QZO, adopt, export, load, release, scales, trainable
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.save import format_of, save
from qzo.commands.main import main
from qzo.errors import QzoError
from qzo.formats.aqlm.layer import AqlmLayout, AqlmLinear
from qzo.live.scales import has_signed_scales, quantized_bytes
from qzo.quantizers.aqlm import quantize_aqlm

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make_folder(make_model, tmp_path):
    """`make_folder(layout, family)`: a checkpoint with codes found by k-means, written by the package."""

    def make(layout=None, family="llama"):
        folder = tmp_path / "model"
        save(quantize_aqlm(make_model(family, torch.float16), layout), folder)
        return folder

    return make


@pytest.fixture
def library(monkeypatch):
    """The `aqlm` library; its CPU kernel for 256 entries, which it compiles with numba, runs as plain Python."""
    aqlm = pytest.importorskip("aqlm")
    plain = types.ModuleType("numba")
    plain.njit, plain.prange = (lambda **_: lambda function: function), range
    monkeypatch.setitem(sys.modules, "numba", plain)
    monkeypatch.setitem(sys.modules, "aqlm.inference_kernels.numba_kernel", None)
    monkeypatch.delitem(sys.modules, "aqlm.inference_kernels.numba_kernel")
    return aqlm


def live(columns=64, rows=24, layout=(2, 8, 8)):
    return nn.Sequential(cases_aqlm.quantized(nn.Linear(columns, rows), *layout, dtype=torch.float32))


@pytest.mark.parametrize("layout", [AqlmLayout(1, 16), AqlmLayout(2, 8), AqlmLayout(2, 6, 4, 2)], ids=lambda v: v.name)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_saved_is_loaded_to_the_bit(make_model, input_ids, tmp_path, layout, family):
    model = quantize_aqlm(make_model(family), layout)
    save(model, tmp_path / "model")
    found = load(tmp_path / "model")
    assert format_of(tmp_path / "model") == "aqlm" and not (tmp_path / "model/quantize_config.json").exists()
    state, own = found.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())
    assert torch.equal(found(input_ids).logits, model(input_ids).logits)


def test_the_library_reads_what_is_saved(make_folder, input_ids):
    pytest.importorskip("aqlm")
    folder = make_folder()
    expected = cases_aqlm.logits(folder, input_ids)
    torch.testing.assert_close(load(folder, torch.float32)(input_ids).logits, expected, rtol=0, atol=1e-5)


def test_one_checkpoint_holds_one_layout(make_model, tmp_path):
    model = quantize_aqlm(make_model())
    model.model.layers[1].mlp.up_proj = AqlmLinear.empty(64, 160, AqlmLayout(1, 8))
    with pytest.raises(QzoError, match=r"up_proj: AqlmLayout.num_codebooks=1.* another layer has"):
        save(model, tmp_path / "model")
    with pytest.raises(QzoError, match='a AqlmLinear cannot be written with checkpoint_format="gptq"'):
        save(model, tmp_path / "model", checkpoint_format="gptq")


def test_layers_left_unquantized_stay_so(make_model, tmp_path, input_ids):
    pytest.importorskip("aqlm")
    make_model().save_pretrained(tmp_path / "plain")
    folder = cases_aqlm.write(tmp_path / "plain", tmp_path / "model", skip=("o_proj",))
    model = load(folder, torch.float32)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear and len(scales(model)) == 12
    torch.testing.assert_close(model(input_ids).logits, cases_aqlm.logits(folder, input_ids), rtol=0, atol=1e-5)
    save(model, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (folder / "config.json").read_bytes()
    torch.testing.assert_close(cases_aqlm.logits(tmp_path / "again", input_ids), model(input_ids).logits)


def test_scales_and_codebooks_keep_their_dtype_whatever_the_rest_gets(make_folder):
    model = load(make_folder(), torch.float32)
    layer = model.get_submodule(Q_PROJ)
    assert (layer.scales.dtype, layer.codebooks.dtype, model.dtype) == (torch.float16, torch.float16, torch.float32)
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_the_papers_set_is_the_scales_and_all_that_is_not_quantized(make_folder, make_model):
    """Q-SPSA on channel scales, SPSA on norms, biases, embeddings and head, one stream of z."""
    model = load(make_folder(family="opt"), torch.float32)
    tuned, rest = trainable(model, "scales+unquantized")
    linears = {path for path, module in model.named_modules() if isinstance(module, AqlmLinear)}
    plain = {name for name, _ in make_model("opt").named_parameters()}
    assert tuned["params"].keys() == {f"{path}.scales" for path in linears} and len(linears) == 12
    assert rest["params"].keys() == plain - {f"{path}.weight" for path in linears}
    assert rest["nonnegative"] is False and "nonnegative" not in tuned
    optimizer = QZO([tuned, rest], lr=1e-4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input_ids = torch.randint(5, 96, (8, 24))
    losses = [optimizer.step(lambda: model(input_ids, labels=input_ids).loss) for _ in range(20)]
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    still = {f"{path}.{part}" for path in linears for part in ("codes", "codebooks")}
    assert moved | still == before.keys() and not moved & still


def dense_loss(layer, scale, codebooks, x, target):
    """Differentiable in both."""
    codes = layer.codes.long() % codebooks.shape[1]
    sums = sum(codebooks[c, :, 0][codes[..., c]] for c in range(len(codebooks)))
    return (x @ (sums.flatten(1) * scale.view(-1, 1)).t() - target).square().mean()


def test_codebooks_are_trained_by_their_own_derivative():
    layer = quantize_aqlm(nn.Sequential(nn.Linear(64, 24, bias=False)), AqlmLayout(2, 8))
    groups = trainable(layer, "scales+codebooks")
    assert [list(group["params"]) for group in groups] == [["0.scales"], ["0.codebooks"]]
    assert groups[1]["params"]["0.codebooks"] is layer[0].codebooks and groups[1]["nonnegative"] is False
    x, target = torch.randn(32, 64), torch.randn(32, 24)
    optimizer = QZO(groups, lr=0.0, eps=1e-3, clip_threshold=None)
    leaves = {"0.scales": layer[0].scales.clone(), "0.codebooks": layer[0].codebooks.clone()}
    for tensor in leaves.values():
        tensor.requires_grad_()
    loss = dense_loss(layer[0], *leaves.values(), x, target)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
    for _ in range(5):
        optimizer.step(lambda: (layer(x) - target).double().square().mean())
        z = optimizer.direction()
        exact = sum(float((gradients[name] * z[name]).sum()) for name in leaves)
        assert optimizer.last.directional_derivative == pytest.approx(exact, rel=0.01, abs=1e-3)
    assert all(torch.equal(tensor.detach(), layer.state_dict()[name]) for name, tensor in leaves.items())


def test_trained_codebooks_are_journalled_replayed_and_exported(make_folder, input_ids, tmp_path):
    folder = make_folder()
    model = load(folder)
    optimizer = QZO(trainable(model, "scales+codebooks"), lr=1e-3)
    with qzo.Journal(tmp_path / "run.journal", model, optimizer) as journal:
        for _ in range(3):
            optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
            journal.record()
    assert main(["replay", str(folder), str(tmp_path / "run.journal"), str(tmp_path / "out")]) == 0
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {name for group in optimizer.param_groups for name in group["param_names"]} and len(moved) == 28
    state = model.state_dict()
    assert all(torch.equal(new[name], state[name]) for name in old)
    assert not torch.equal(load(tmp_path / "out")(input_ids).logits, load(folder)(input_ids).logits)


def test_sets_that_a_model_does_not_have_are_refused(make_model):
    with pytest.raises(QzoError, match='LlamaForCausalLM has no codebook; choose "scales"'):
        trainable(qzo.quantize(make_model(), 4, 32), "scales+codebooks")
    with pytest.raises(QzoError, match='"scales\\+codebooks"'):
        trainable(quantize_aqlm(make_model()), "codebooks")


def test_a_negative_scale_is_trained_as_it_is(make_folder):
    folder = make_folder()
    assert not has_signed_scales(load(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}.scales"][3] *= -1
    save_file(tensors, folder / "model.safetensors")
    groups = trainable(load(folder))
    assert groups[0]["nonnegative"] is False
    QZO(groups)


@pytest.mark.parametrize("layout", [(2, 8, 8), (1, 16, 8)], ids=["2x8", "1x16"])
@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("columns", [64, 192])
def test_modules_of_the_library_are_taken_over_and_given_back(library, layout, after_forward, columns):
    """With 192 columns, 24 groups in each of 24 rows: turned codes have the shape of others."""
    model = live(columns=columns, layout=layout)
    x, original, kept = torch.randn(2, columns), model[0], {n: t.clone() for n, t in model.state_dict().items()}
    if after_forward:
        expected = model(x)
        turned = layout[1] == 8
        assert torch.equal(original.codes, kept["0.codes"].transpose(0, 1)) is turned
    adopt(model)
    layer = model[0]
    assert type(layer) is AqlmLinear and torch.equal(layer.codes, kept["0.codes"])
    for name in ("codes", "codebooks", "scales"):
        assert getattr(layer, name).data_ptr() == getattr(original, name).data_ptr()
    if after_forward:
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    scales(model)["0.scales"].mul_(1.5)
    trained = layer(x)
    release(model)
    assert type(model[0]) is library.QuantizedLinear and model[0].gemv_op is None
    assert torch.equal(model[0].codes, kept["0.codes"]) and model[0].codes.is_contiguous()
    assert torch.equal(model[0].scales, 1.5 * kept["0.scales"])
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", [AqlmLayout(1, 8, 16), AqlmLayout(2, 8)], ids=lambda layout: layout.name)
def test_a_model_that_transformers_loaded_is_taken_over_and_given_back(library, make_folder, input_ids, layout):
    folder = make_folder(layout)
    expected = cases_aqlm.logits(folder, input_ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adopt(model)
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=1e-5)
    assert scales(model).keys() == scales(load(folder)).keys() and not any(p.requires_grad for p in model.parameters())
    optimizer = QZO(scales(model), lr=1e-2, relative=True)
    for _ in range(3):
        optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
    trained = model(input_ids).logits
    release(model)
    assert sum(isinstance(module, library.QuantizedLinear) for module in model.modules()) == 14
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids[:1, :3]).logits, trained[:1, :3], rtol=0, atol=1e-4)


def test_codes_that_do_not_fit_are_told_with_the_layers_name(library):
    model = live()
    model[0].codes.data = model[0].codes.data[:5]
    with pytest.raises(QzoError, match=r"^0: codes have shape \(5, 8, 2\), which does not fit the layer; load it"):
        adopt(model)
    assert type(model[0]) is library.QuantizedLinear


def test_without_the_library_the_install_command_is_told(make_model, monkeypatch):
    model = quantize_aqlm(make_model())
    monkeypatch.setitem(sys.modules, "aqlm", None)
    with pytest.raises(QzoError, match=r"needs the package aqlm; run: pip install 'qzo\[aqlm\]'"):
        release(model)
    assert len(scales(model)) == 14


def test_train_and_export_commands_keep_the_format(make_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qzo.tasks", standin.module())
    folder = make_folder()
    standin.write_tokenizer(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    run = ["train", str(folder), *standin.PAPER, "--steps", "4", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    assert main(run) == 0 and main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--state", "last"]) == 0
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(scales(load(folder)))
    export(folder, tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == before["model.safetensors"]


@pytest.mark.parametrize(("layout", "n_bits"), [(AqlmLayout(1, 16), 16), (AqlmLayout(2, 8), 8)], ids=["1x16", "2x8"])
def test_inspect_counts_what_the_loaded_model_has(make_folder, capsys, layout, n_bits):
    folder = make_folder(layout)
    found, sizes = inspect(folder), quantized_bytes(load(folder))
    assert (found.reason, found.format, found.version, found.n_bits, found.group_size, found.layers) == (
        None,
        "aqlm",
        layout.name,
        n_bits,
        8,
        14,
    )
    assert {part: found.sizes[part] for part in ("codes", "scales", "codebooks")} == {
        part: sizes[part] for part in ("codes", "scales", "codebooks")
    }
    assert found.counts["codes"] == 86016 // 8 * layout.num_codebooks
    model = load(folder)
    for name, count in found.trainable.items():
        assert count == sum(tensor.numel() for group in trainable(model, name) for tensor in group["params"].values())
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"aqlm, {layout.name}" in out and "scales+codebooks" in out and "trains with QZO       yes" in out
