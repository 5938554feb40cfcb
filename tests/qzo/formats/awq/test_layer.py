"""AWQ checkpoints: read, run, trained and written back as they came, against a slow reader and writer."""

import copy
import json
import sys

import pytest
import standin
import torch
from awq_files import awq_tensors, slow_codes, slow_weight, slow_words, write_awq
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

import qzo
from qzo import QZO, export, load, scales
from qzo.checkpoints.save import format_of, save
from qzo.commands.main import main
from qzo.errors import QzoError
from qzo.formats.awq.layer import AwqLinear, unpack
from qzo.kernels import rebuilt as chunked
from qzo.live.scales import quantized_bytes

FAMILIES = ("llama", "opt")


def layer_of(weight, group_size=16):
    """An AwqLinear with the tensors of the slow writer."""
    layer = AwqLinear.empty(weight.shape[1], weight.shape[0], group_size, dtype=torch.float32)
    layer.load_state_dict({name[2:]: tensor for name, tensor in awq_tensors(weight, "x", group_size).items()})
    return layer


def plain_model(folder, model):
    """The checkpoint's numbers in a plain fp32 model of the same kind."""
    tensors, plain = load_file(folder / "model.safetensors"), copy.deepcopy(model).float()
    state = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if part == "qweight":
            state[f"{path}.weight"] = slow_weight(tensors, path)
        elif part not in ("qzeros", "scales"):
            state[name] = tensor.float()
    report = plain.load_state_dict(state, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}
    return plain


def test_codes_are_read_in_the_order_of_the_columns():
    codes = torch.randint(0, 16, (5, 48))
    words = slow_words(codes.tolist())
    assert torch.equal(unpack(words), codes.int()) and torch.equal(slow_codes(words), codes)
    first = slow_words([[1, 2, 3, 4, 5, 6, 7, 15]])
    assert first.item() == 0xF6427531 - 2**32


@pytest.mark.parametrize("group_size", [16, 32, 96])
def test_forward_and_gradients_equal_the_dense_product(monkeypatch, group_size):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * 96)  # chunks that end within a word
    layer = layer_of(torch.randn(64, 96), group_size)
    dense = slow_weight({f"x.{name}": buffer for name, buffer in layer.named_buffers()}, "x")
    assert torch.equal(layer.dequantize(), dense)
    layer.bias = nn.Parameter(torch.randn(64), requires_grad=False)
    layer.scales.requires_grad_()
    x = torch.randn(2, 3, 96, requires_grad=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias), rtol=1e-5, atol=1e-4)
    target = torch.randn(2, 3, 64)
    rows = layer._rows(0, 64, torch.float32, layer.scales)
    ours = torch.autograd.grad((layer(x) * target).sum(), [x, layer.scales])
    expected = torch.autograd.grad((nn.functional.linear(x, rows, layer.bias) * target).sum(), [x, layer.scales])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_layers_on_meta_answer_with_shapes_and_sizes_are_exact():
    layer = AwqLinear.empty(512, 256, 128, bias=True, device="meta")
    y = layer(torch.empty(2, 512, dtype=torch.bfloat16, device="meta"))
    assert y.is_meta and y.shape == (2, 256)
    sizes = {name: tensor.nbytes for name, tensor in (*layer.named_buffers(), *layer.named_parameters())}
    assert sizes == {"qweight": 512 * 256 // 2, "qzeros": 4 * 256 // 2, "scales": 4 * 256 * 2, "bias": 512}
    with pytest.raises(QzoError, match="out_features=60 is not a multiple of 8"):
        AwqLinear.empty(512, 60)
    with pytest.raises(QzoError, match="not divisible by group_size=100"):
        AwqLinear.empty(512, 64, 100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_gives_the_logits_of_its_dense_twin(make_model, input_ids, tmp_path, family, tied):
    model = make_model(family, tied=tied)
    folder = write_awq(model, tmp_path / "model")
    found = load(folder, torch.float32)
    expected = plain_model(folder, model)(input_ids).logits
    torch.testing.assert_close(found(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert load(folder).dtype == torch.float16


def test_the_scales_found_are_all_the_scales(make_model, tmp_path):
    folder = write_awq(make_model(), tmp_path / "model")
    stored = {name: t for name, t in load_file(folder / "model.safetensors").items() if name.endswith(".scales")}
    model = load(folder)
    found = scales(model)
    assert found.keys() == stored.keys() and len(found) == 14
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160)
    count = weights // 32
    sizes = {name: size for name, size in quantized_bytes(model).items() if size}
    assert sizes == {"codes": weights // 2, "scales": 2 * count, "zero_points": count // 2, "scale_count": count}


def test_layers_left_unquantized_stay_so(make_model, input_ids, tmp_path):
    model = make_model()
    folder = write_awq(model, tmp_path / "model", skip=("o_proj", "layers.1.mlp"))
    found = load(folder, torch.float32)
    assert type(found.model.layers[0].self_attn.o_proj) is nn.Linear and len(scales(found)) == 9
    torch.testing.assert_close(found(input_ids).logits, plain_model(folder, model)(input_ids).logits)
    save(found, tmp_path / "again")
    read, written = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again"))
    assert read == written and read["quantization_config"]["modules_to_not_convert"] == ["o_proj", "layers.1.mlp"]
    again = load(tmp_path / "again", torch.float32)
    assert torch.equal(again(input_ids).logits, found(input_ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_the_export_holds_the_tuned_scales(make_model, tmp_path, family):
    folder = write_awq(make_model(family), tmp_path / "model")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tuned = load(folder, torch.float32)
    input_ids = torch.randint(5, 96, (8, 24))
    optimizer = QZO(scales(tuned), lr=1e-5, eps=1e-4)
    losses = [optimizer.step(lambda: tuned(input_ids, labels=input_ids).loss) for _ in range(50)]
    assert losses[-1] < losses[0]
    save(tuned, tmp_path / "tuned", checkpoint_format=format_of(folder))
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "tuned"))
    for name, tensor in old.items():
        trained = name.endswith(".scales")
        assert torch.equal(new[name], scales(tuned)[name] if trained else tensor.to(new[name].dtype)), name
    again = load(tmp_path / "tuned", torch.float32)
    assert torch.equal(again(input_ids).logits, tuned(input_ids).logits)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_perturbations_are_undone_to_the_bit_and_d_is_autograds(make_model, tmp_path):
    model = load(write_awq(make_model(), tmp_path / "model"), torch.float32)
    input_ids = torch.randint(5, 96, (16, 24))

    def loss():  # the mean in fp64: one unit of fp32 at 4.6 is 2 % of the smallest 2 eps d
        logits = model(input_ids).logits[:, :-1].double()
        return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())

    for scale in scales(model).values():  # in fp32: fp16 scales round the perturbation
        scale.data = scale.data.float()
    start = {name: scale.clone() for name, scale in scales(model).items()}
    optimizer = QZO(scales(model), lr=0.0, eps=2e-5, clip_threshold=None)
    for _ in range(5):
        optimizer.step(loss)
        live, z = scales(model), optimizer.direction()
        assert all(torch.equal(live[name], start[name]) for name in start)
        tensors = [scale.requires_grad_() for scale in live.values()]
        gradients = torch.autograd.grad(loss(), tensors)
        exact = sum(float((g.double() * z[n].double()).sum()) for n, g in zip(live, gradients, strict=True))
        for scale in tensors:
            scale.requires_grad_(False)
        assert optimizer.last.directional_derivative == pytest.approx(exact, rel=0.01)


def test_journal_replay_and_export_know_the_format(make_model, input_ids, tmp_path):
    folder = write_awq(make_model(), tmp_path / "model")
    model = load(folder)
    optimizer = QZO(scales(model), lr=1e-3)
    with qzo.Journal(tmp_path / "run.journal", model, optimizer) as journal:
        for _ in range(3):
            optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
            journal.record()
    assert main(["replay", str(folder), str(tmp_path / "run.journal"), str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    out = load(tmp_path / "out")
    assert all(torch.equal(scale, scales(model)[name]) for name, scale in scales(out).items())
    export(folder, tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(QzoError, match='a AwqLinear cannot be written with checkpoint_format="gptq"'):
        save(model, tmp_path / "wrong", checkpoint_format="gptq")


def test_settings_of_autoawqs_own_file_are_read(make_model, input_ids, tmp_path):
    folder = write_awq(make_model(), tmp_path / "model")
    expected = load(folder)(input_ids).logits
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(own))
    assert torch.equal(load(folder)(input_ids).logits, expected)


def test_train_and_export_commands_and_the_trainer_keep_the_format(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qzo.tasks", standin.module())
    folder = write_awq(make_model(), tmp_path / "model")
    standin.write_tokenizer(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = ["train", str(folder), *standin.PAPER, "--steps", "4", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    assert main(command) == 0 and main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--state", "last"]) == 0
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(scales(load(folder)))
    replayed = load(folder)
    qzo.replay(replayed, tmp_path / "run/run.journal")
    assert all(torch.equal(new[name], scale) for name, scale in scales(replayed).items())
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    row = torch.arange(5, 13)
    trainer = qzo.QZOTrainer(
        load(folder),
        TrainingArguments(str(tmp_path / "trainer"), **options),
        train_dataset=[{"input_ids": row, "labels": row}] * 8,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert all(torch.equal(own, scales(trainer.model)[name]) for name, own in scales(load(tmp_path / "saved")).items())
    assert format_of(tmp_path / "saved") == "awq"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "gemv"}, 'AWQ version="gemv" is not supported; need gemm'),
        ({"version": "marlin"}, 'AWQ version="marlin"'),
        ({"version": "exllama"}, 'AWQ version="exllama"'),
        ({"bits": 3}, "AWQ with bits=3 is not supported"),
        ({"zero_point": False}, "zero_point=false is not supported"),
        ({"group_size": 16}, "but config.json implies I32"),
        ({"group_size": None}, "must have whole numbers bits and group_size"),
        ({"group_size": 48}, "not divisible by group_size=48"),
        ({"quant_method": "gptq"}, "but config.json implies I32"),
    ],
)
def test_other_versions_and_contradictions_are_one_line(make_model, tmp_path, settings, message):
    folder = write_awq(make_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QzoError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
