"""QZO on the scales of GGUF blocks: true derivatives, falling loss, nothing but scales moved, journal and replay."""

import pytest
import torch
from gguf_files import SIMPLE, tiny, write_gguf
from transformers import TrainingArguments

from qzo import QZO, Journal, QzoError, QZOTrainer, label_loss, load, replay, scales, trainable
from qzo.checkpoints.inspect import inspect
from qzo.formats.gguf.codes import half_at
from qzo.formats.gguf.layer import GgufEmbedding, GgufTensor
from qzo.live.trainable import live_named
from qzo.training.learners import check_model, make_learner
from qzo.training.settings import TrainSettings


def packed(tmp_path, kind, dtype=torch.float32, **options):
    file = tmp_path / f"{kind}.gguf"
    return load(file if file.exists() else write_gguf(tiny(**options), file, kind), dtype, dequantize=False)


def loss_on(model, rows=8, length=16):
    """The loss on a fixed batch, in fp64 from fp32 logits: differences of 2 eps d must be seen."""
    input_ids = torch.randint(5, 96, (rows, length), generator=torch.Generator().manual_seed(1))

    def loss():
        logits = model(input_ids).logits[:, :-1].double()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())

    return loss


def blocks_of(model):
    return {path: module.blocks.clone() for path, module in model.named_modules() if isinstance(module, GgufTensor)}


def leaves_for(model, monkeypatch):
    """fp32 leaves in the place of scales and offsets, which are views of packed bytes; name -> leaf."""
    paths = {module: path for path, module in model.named_modules()}
    leaves = {
        name: tensor.detach().float().requires_grad_()
        for name, tensor in live_named(model).items()
        if name.endswith((".scales", ".offsets"))
    }
    for part in ("scales", "offsets"):
        given = property(lambda module, part=part: leaves.get(f"{paths[module]}.{part}"))
        monkeypatch.setattr(GgufTensor, part, given)
    return leaves


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("follow", [False, True])
def test_d_is_the_true_directional_derivative_within_one_percent(tmp_path, monkeypatch, kind, follow):
    """Along the step that the live numbers took: an fp16 number is the rounding of master ± eps z."""
    model, eps = packed(tmp_path, kind), 1e-4
    loss = loss_on(model)
    optimizer = QZO(trainable(model, follow=follow), lr=0.0, eps=eps, clip_threshold=None)
    live = {name: tensor for name, tensor in live_named(model).items() if name.endswith((".scales", ".offsets"))}
    steps = []

    def watched():
        steps.append({name: tensor.float().clone() for name, tensor in live.items()})
        return loss()

    for _ in range(8):
        optimizer.step(watched)
    seen = optimizer.last.directional_derivative
    z = optimizer.direction()
    with monkeypatch.context() as patched:
        leaves = leaves_for(model, patched)
        gradients = dict(zip(leaves, torch.autograd.grad(loss(), list(leaves.values())), strict=True))
    moved = {name: (steps[-2][name] - steps[-1][name]) / (2 * eps) for name in live}
    assert any(name.endswith("offsets") and along.any() for name, along in moved.items()) == (kind == "Q4_1" and follow)
    exact = sum(float((gradients[name].double() * along.double()).sum()) for name, along in moved.items())
    assert seen == pytest.approx(exact, rel=0.01)
    for name, along in z.items():
        assert torch.nn.functional.cosine_similarity(moved[name].flatten(), along.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("kind", SIMPLE)
def test_fifty_steps_lower_the_loss_of_a_batch_and_move_scales_alone(tmp_path, kind):
    model = packed(tmp_path, kind)
    loss, before = loss_on(model, 2, 8), blocks_of(model)
    optimizer = QZO(trainable(model, "scales+vocabulary", follow=False), lr=1e-2, eps=1e-2, relative=True)
    losses = [optimizer.step(loss) for _ in range(50)]
    assert losses[-1] < losses[0] - 0.1
    for path, blocks in blocks_of(model).items():
        assert not torch.equal(half_at(blocks, 0), half_at(before[path], 0))
        assert torch.equal(blocks[..., 2:], before[path][..., 2:]), path


@pytest.mark.parametrize("kind", SIMPLE)
def test_perturbing_is_undone_to_the_bit(tmp_path, kind):
    model = packed(tmp_path, kind)
    before = blocks_of(model)
    optimizer = QZO(trainable(model, "scales+offsets"), lr=0.0)
    optimizer.step(loss_on(model))
    assert all(torch.equal(blocks, before[path]) for path, blocks in blocks_of(model).items())

    def broken():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step(broken)
    optimizer.step(lambda: float("nan"))
    assert all(torch.equal(blocks, before[path]) for path, blocks in blocks_of(model).items())


def test_negative_scales_are_told_where_max_with_0_would_wipe_them_out(tmp_path):
    model = packed(tmp_path, "Q4_0")
    with pytest.raises(QzoError, match=r"has negative values, .* give its group nonnegative=False"):
        QZO(scales(model), nonnegative=True)
    QZO(scales(packed(tmp_path, "Q8_0")), nonnegative=True)


def test_the_ten_lines_of_the_readme_keep_the_signs_of_q4_0(tmp_path):
    model = packed(tmp_path, "Q4_0")
    before = {name: scale.clone() for name, scale in scales(model).items()}
    optimizer = QZO(scales(model), lr=1e-5, eps=1e-3, clip_threshold=100.0, seed=0)
    optimizer.step(loss_on(model))
    after = scales(model)
    assert any(not torch.equal(scale, after[name]) for name, scale in before.items())
    assert all(float(scale.min()) < 0 for name, scale in after.items() if float(before[name].min()) < -0.01)


@pytest.mark.parametrize(("kind", "what"), [("Q4_0", "scales"), ("Q5_1", "scales+offsets")])
def test_a_journal_rebuilds_the_blocks_to_the_bit(tmp_path, kind, what):
    model, path = packed(tmp_path, kind, torch.bfloat16), tmp_path / "run.journal"
    optimizer = QZO(trainable(model, what), lr=1e-5)
    loss = loss_on(model)
    with Journal(path, model, optimizer) as journal:
        for _ in range(5):
            optimizer.step(loss)
            journal.record()
    again = packed(tmp_path, kind, torch.bfloat16)
    assert not all(torch.equal(blocks, blocks_of(model)[name]) for name, blocks in blocks_of(again).items())
    replay(again, path)
    assert all(torch.equal(blocks, blocks_of(model)[name]) for name, blocks in blocks_of(again).items())
    other = packed(tmp_path, kind, torch.bfloat16)
    other.model.layers[0].mlp.up_proj.blocks[0, 0, -1] ^= 1
    with pytest.raises(QzoError, match="is the journal of another model"):
        replay(other, path)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_trainer_trains_and_resumes_packed_models(tmp_path, kind):
    """Scales of linear layers, and where there are offsets, these by the same relative amount."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 96, (8, 12))]

    def trainer(folder, steps):
        options = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path / folder), max_steps=steps, save_steps=2, **options)
        return QZOTrainer(packed(tmp_path, kind), arguments, train_dataset=rows)

    whole, first, resumed = trainer("whole", 4), trainer("parts", 2), trainer("parts", 4)
    whole.train()
    first.train()
    resumed.train(resume_from_checkpoint=True)
    one, other = blocks_of(whole.model), blocks_of(resumed.model)
    assert all(torch.equal(one[path], other[path]) for path in one)
    for path, module in packed(tmp_path, kind).named_modules():
        if isinstance(module, GgufEmbedding):
            assert torch.equal(whole.model.get_submodule(path).blocks, module.blocks)
        elif isinstance(module, GgufTensor) and module.offsets is not None:
            trained = whole.model.get_submodule(path)
            scale, offset = trained.scales / module.scales, trained.offsets / module.offsets
            assert (scale - 1).abs().max() > 0.01 and torch.allclose(offset, scale, rtol=2e-3, equal_nan=True)


def test_label_loss_runs_on_packed_models(tmp_path):
    model = packed(tmp_path, "Q5_0", torch.bfloat16)
    input_ids = torch.randint(5, 96, (2, 6))
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = 7
    assert torch.isfinite(label_loss(model, input_ids=input_ids, labels=labels))


def test_a_vocabulary_alone_is_not_trained(tmp_path):
    kinds = {"token_embd.weight": "Q8_0"}
    file = write_gguf(tiny(hidden=256), tmp_path / "k.gguf", lambda name: kinds.get(name, "Q6_K"))
    model = load(file, dequantize=False)
    assert list(scales(model, vocabulary=True)) == ["model.embed_tokens.scales"]
    assert "no layer has scales that are not quantized themselves" in str(inspect(file).reason)
    with pytest.raises(QzoError, match="only the vocabulary has scales that can be trained"):
        check_model(model, TrainSettings(method="qzo"), str(file))


@pytest.mark.parametrize("vocabulary", ["Q8_0", "Q4_1", "F16"])
def test_what_is_trained_is_the_same_in_python_on_the_command_line_and_in_inspection(tmp_path, vocabulary):
    kinds = {"token_embd.weight": vocabulary}
    file = write_gguf(tiny(), tmp_path / "model.gguf", lambda name: kinds.get(name, "Q4_1"))
    model, told = load(file, dequantize=False), inspect(file).trainable
    count = sum(scale.numel() for scale in scales(model).values())
    command = make_learner(model, TrainSettings("qzo"), tmp_path).tensors()
    assert (
        {name for name in command if name.endswith("scales")}
        == scales(model).keys()
        == trainable(model)[0]["params"].keys()
    )
    assert told["scales"] == count and told["scales+offsets"] == 2 * count
    every = sum(scale.numel() for scale in scales(model, vocabulary=True).values())
    assert told.get("scales+vocabulary", count) == every and (every > count) == (vocabulary != "F16")
