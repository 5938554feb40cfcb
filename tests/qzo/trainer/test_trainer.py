"""qzo.QZOTrainer: transformers' Trainer with zeroth-order steps."""

import inspect

import accelerate
import pytest
import standin
import torch
import transformers
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

import qzo
from qzo import QZO, MeZO, QzoError, QZOTrainer, load, scales
from qzo.checkpoints.save import format_of
from qzo.journal import lines as journal_lines

DATA = standin.Task().splits()


def dataset(split):
    batch = standin.Objective(None, None).batch(DATA[split])
    return [{name: tensor[number] for name, tensor in batch.items()} for number in range(len(DATA[split]))]


@pytest.fixture
def folder(make_model, tmp_path):
    return standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True, "gptq_v2")


def arguments(out, **more):
    options = {
        "learning_rate": 1e-4,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(out), **{**options, **more})


def trainer(folder, out, callbacks=(), journal=None, **more):
    datasets = {"train_dataset": dataset("train"), "eval_dataset": dataset("validation")}
    args = arguments(out, **more)
    return QZOTrainer(load(folder), args, callbacks=list(callbacks), journal=journal, **datasets)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(TrainerCallback):
    """Dies after a step, without a checkpoint of it."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("resume_at", [3, 6])
def test_a_run_cut_in_two_is_bit_identical(folder, tmp_path, resume_at):
    more = {
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 10,
    }
    whole = trainer(folder, tmp_path / "whole", journal=tmp_path / "whole.journal", **more)
    whole.train()
    first = trainer(folder, tmp_path / "cut", [Stop(resume_at + 2)], tmp_path / "cut.journal", **more)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(folder, tmp_path / "cut", journal=tmp_path / "cut.journal", **more)
    torch.randn(7)  # the global generator is not where the first life left it
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == second.zeroth_order.steps == 10
    assert same(whole.zeroth_order.truth(), second.zeroth_order.truth())
    assert same(scales(whole.model), scales(second.model))
    assert (tmp_path / "whole.journal").read_bytes() == (tmp_path / "cut.journal").read_bytes()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    replayed = load(folder)
    qzo.replay(replayed, tmp_path / "cut.journal")
    assert same(scales(replayed), scales(second.model))


def test_a_step_is_that_of_the_optimizer_alone(folder, tmp_path):
    made = trainer(folder, tmp_path / "out", max_steps=1, train_sampling_strategy="sequential")
    made.train()
    model = load(folder)
    optimizer = QZO(scales(model), lr=1e-4, seed=3)
    batch = standin.Objective(None, None).batch(DATA["train"][:4])
    loss = optimizer.step(lambda: model(**batch).loss)
    assert made.zeroth_order.last.loss_plus == pytest.approx(optimizer.last.loss_plus, rel=1e-6)
    assert made.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_micro_batches_accumulate_to_the_step_of_the_whole_batch(folder, tmp_path):
    made = []
    for size, count in ((8, 1), (2, 4)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_steps": 3}
        made.append(trainer(folder, tmp_path / "out", train_sampling_strategy="sequential", **more))
        made[-1].model.float()
        made[-1].train()
    whole, parts = (run.zeroth_order.truth() for run in made)
    assert all(run.zeroth_order.steps == 3 for run in made)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-6)
    assert made[1].zeroth_order.last.loss_plus == pytest.approx(made[0].zeroth_order.last.loss_plus, rel=1e-5)


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **_: self.seen.append((name, state.global_step))
        return super().__getattribute__(name)


def test_the_callbacks_of_trainer_fire(folder, tmp_path):
    events = Events()
    more = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer(folder, tmp_path / "out", [events], gradient_accumulation_steps=2, **more).train()
    seen = [name for name, _ in events.seen]
    assert seen[0] == "on_init_end" and seen[1] == "on_train_begin" and seen[-1] == "on_train_end"
    step = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    assert [name for name in seen if name in step[:5]] == step[:5] * 2
    assert seen.count("on_evaluate") == 2 and seen.count("on_save") == 1 and seen.count("on_log") >= 4


def test_logs_tell_d_clipping_and_skips_but_no_gradient_norm(folder, tmp_path):
    class Unclip(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                made.zeroth_order.param_groups[0]["clip_threshold"] = None

    made = trainer(folder, tmp_path / "out", [Unclip()], logging_steps=2)
    made.qzo_options = {"clip_threshold": 1e-9}
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["clipped_share"] for entry in logs] == [1, 1, 0.5, 0] and logs[0]["skipped_steps"] == 0
    assert logs[-1]["directional_derivative"] == made.zeroth_order.last.directional_derivative
    assert not any("grad_norm" in entry for entry in made.state.log_history)


def test_schedulers_reach_the_scales(folder, tmp_path):
    made = trainer(folder, tmp_path / "out", lr_scheduler_type="linear", max_steps=4)
    made.train()
    rates = [entry["learning_rate"] for entry in made.state.log_history if "loss" in entry]
    assert rates[0] == pytest.approx(7.5e-5) or rates[0] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True) and made.zeroth_order.last.options[0]["lr"] == pytest.approx(2.5e-5)


def test_evaluation_best_model_and_early_stopping_are_trainers(folder, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 30}
    made = trainer(folder, tmp_path / "out", [EarlyStoppingCallback(2)], **more, **best)
    made.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry}
    step = min(losses, key=losses.get)
    assert len(losses) == step + 2 < 30
    kept = load_file(tmp_path / f"out/checkpoint-{step}/trained.safetensors")
    assert same(kept, scales(made.model)) and made.evaluate()["eval_loss"] == losses[step]
    masters = made.zeroth_order.truth()
    assert all(
        torch.equal(masters[f"{n}.master"].half(), tensor) for n, tensor in enumerate(scales(made.model).values())
    )


def test_a_checkpoint_holds_scales_and_can_be_exported(folder, tmp_path, input_ids):
    made = trainer(folder, tmp_path / "out", save_strategy="steps", save_steps=8)
    made.train()
    checkpoint = tmp_path / "out/checkpoint-8"
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    bound = sum(scale.numel() for scale in scales(made.model).values())
    assert sizes["trained.safetensors"] < 2 * bound + 4096 and sizes["optimizer.pt"] < 4 * bound + 16384
    assert "model.safetensors" not in sizes
    assert qzo.export(checkpoint, tmp_path / "exported") == len(scales(made.model))
    made.save_model(tmp_path / "out")
    assert format_of(tmp_path / "out") == format_of(tmp_path / "exported") == "gptq_v2"
    with torch.no_grad():
        logits = made.model(input_ids).logits
        for written in ("exported", "out"):
            assert torch.equal(load(tmp_path / written)(input_ids).logits, logits)


def test_a_loss_that_is_not_finite_is_skipped_and_ends_the_run(folder, tmp_path):
    made = trainer(folder, tmp_path / "out", journal=tmp_path / "run.journal", max_steps=40)
    compute, calls = made.compute_loss, []

    def broken(*given, **named):
        calls.append(0)
        return compute(*given, **named) * (float("nan") if len(calls) > 7 else 1.0)

    made.compute_loss = broken
    with pytest.raises(QzoError, match="not finite for 10 steps in a row, up to step 11"):
        made.train()
    assert made.state.log_history[-1]["skipped_steps"] == 9
    assert journal_lines.read(tmp_path / "run.journal").steps == 11
    assert all(tensor.isfinite().all() for tensor in scales(made.model).values())


def test_mezo_trains_and_resumes_an_unquantized_model(make_model, tmp_path):
    path = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "plain", False)
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def make(out, callbacks=()):
        model = load(path)
        optimizer = MeZO(model.named_parameters(), lr=1e-3)
        args, data = arguments(out, **more), dataset("train")
        return QZOTrainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=list(callbacks))

    whole, cut = make(tmp_path / "whole"), make(tmp_path / "cut", [Stop(3)])
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = make(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert same(dict(whole.model.named_parameters()), dict(again.model.named_parameters()))
    assert not same(dict(whole.model.named_parameters()), dict(load(path).named_parameters()))


def test_the_model_is_in_eval_mode_for_both_evaluations(folder, tmp_path):
    made, modes = trainer(folder, tmp_path / "out", max_steps=2), []
    made.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    made.train()
    assert modes == [False] * (3 + 4)  # the check that scales are live, then two steps


@pytest.mark.parametrize("case", ["unquantized", "adamw", "fp16", "journal", "mezo", "again", "lr", "optimizer"])
def test_wrong_input_is_told(folder, make_model, tmp_path, case):
    data = dataset("train")
    made, message, resume = None, "", None
    if case == "unquantized":
        model = make_model(dtype=torch.bfloat16)
        made, message = QZOTrainer(model, arguments(tmp_path / "out"), train_dataset=data), "has no quantized layer"
    elif case == "adamw":
        model, head = load(folder), torch.nn.Parameter(torch.zeros(1))
        given = (torch.optim.AdamW([head]), None)
        made = QZOTrainer(model, arguments(tmp_path / "out"), train_dataset=data, optimizers=given)
        message = "a AdamW needs gradients"
    elif case == "fp16":
        with pytest.raises(QzoError, match="fp16=True scales gradients"):
            args = arguments(tmp_path / "out")
            args.fp16 = True
            QZOTrainer(load(folder), args, train_dataset=data)
        return
    elif case == "journal":
        other = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "other", True)
        trainer(folder, tmp_path / "out", journal=tmp_path / "run.journal").train()
        made = trainer(other, tmp_path / "out", journal=tmp_path / "run.journal")
        message = "is the journal of another model"
    elif case == "mezo":
        model = make_model(dtype=torch.bfloat16)
        given = (MeZO(model.named_parameters()), None)
        made = QZOTrainer(
            model, arguments(tmp_path / "out"), optimizers=given, train_dataset=data, journal=tmp_path / "j"
        )
        message = "a Trainer's journal is for QZO"
    elif case == "again":
        made = trainer(folder, tmp_path / "out", journal=tmp_path / "run.journal")
        made.train()
        message = "the journal was closed when train"
    elif case == "lr":
        made, message = trainer(folder, tmp_path / "out", learning_rate=-1.0), "lr=-1.0 is negative"
    else:
        made = trainer(folder, tmp_path / "out", save_strategy="steps", save_steps=8, save_only_model=True)
        made.train()
        made, resume = trainer(folder, tmp_path / "out"), True
        message = "has no optimizer.pt"
    with pytest.raises(QzoError, match=message):
        made.train(resume_from_checkpoint=resume)


def test_no_library_is_patched(folder, tmp_path):
    made = trainer(folder, tmp_path / "out", max_steps=1)
    made.train()
    for library in (transformers.Trainer, accelerate.Accelerator, torch.optim.Optimizer, type(made.model)):
        origin = library.__module__.split(".")[0]
        methods = [value for value in vars(library).values() if inspect.isfunction(value)]
        assert methods and not any(method.__module__.startswith("qzo") for method in methods)
        assert any(method.__module__.startswith(origin) for method in methods)
