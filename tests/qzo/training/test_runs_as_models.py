"""A run folder is taken wherever a model is: it gives what its export gives, or refuses as the export does."""

import json
import shutil
import sys

import pytest
import standin
import torch
import trainer_lives
from gguf_files import tiny, write_gguf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, TrainingArguments

import qzo
from qzo import QzoError
from qzo.commands.main import main
from qzo.models.origin import origin_of
from qzo.training.run import read_run
from qzo.training.tuned.state import read_tuned

STEPS = ["--steps", "2", "--batch-size", "4", "--eval-every", "2"]
METHODS = {"gptq": "qzo", "gguf": "qzo", "mezo": "mezo", "ft": "ft"}


def says(capsys, code, *command):
    """Run a command that must end with `code`; its one line of error, or all that it printed."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == code, capsys.readouterr()
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == bool(code) and "Traceback" not in shown.err
    return lines[0] if code else shown.out + shown.err


def train(model, out, *options, method="qzo"):
    """A command that makes a run whose best state is that after its last step."""
    lr = {"qzo": "1e-3", "mezo": "1e-4"}.get(method, "1e-2")
    return ["train", model, *standin.PAPER, *STEPS, "--method", method, "--lr", lr, "--out", out, *options]


@pytest.fixture
def rising(task):
    """A task whose accuracy rises with every look at it."""
    scores = iter(range(1000))
    task.evaluate = lambda *_, **__: {"accuracy": next(scores) / 1000, "loss": 1.0, "count": 1}
    return task


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(kind)`: folder of a run, made once; its model lies beside it, in `model` or `model.gguf`."""
    made = {}

    def run(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            method, source = METHODS.get(kind, kind), place / "model"
            torch.manual_seed(0)
            if kind == "gguf":
                source = write_gguf(tiny("llama"), place / "model.gguf", "Q4_1")
            else:
                model = AutoModelForCausalLM.from_config(tiny_config("llama", False), dtype=torch.bfloat16)
                standin.write_model(model.eval(), source, method in ("qzo", "qlora"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "qzo.tasks", task := standin.module())
                scores = iter(range(1000))
                task.evaluate = lambda *_, **__: {"accuracy": next(scores) / 1000, "loss": 1.0, "count": 1}
                command = train(source, place / "run", method=method)
                assert main([str(word) for word in command]) == 0
        else:
            place = made[kind]
        made[kind] = place
        return place / "run"

    return run


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def base_of(run):
    return read_run(run)["model"]


# in Python


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dequantize", [True, False])
def test_a_run_loads_as_its_export_does(runs, tmp_path, input_ids, kind, dequantize):
    run, is_file = runs(kind), kind == "gguf"
    qzo.export(run, out := tmp_path / ("out.gguf" if is_file else "out"))
    dtype = torch.bfloat16 if kind == "ft" else None  # of the export; the run has float32
    tuned, same = qzo.load(run, dtype, dequantize=dequantize), qzo.load(out, dtype, dequantize=dequantize)
    assert torch.equal(logits(tuned, input_ids), logits(same, input_ids))
    untouched = qzo.load(base_of(run), dtype, dequantize=dequantize)
    assert not torch.equal(logits(tuned, input_ids), logits(untouched, input_ids))
    assert {name for name, _ in tuned.named_parameters()} == {name for name, _ in same.named_parameters()}
    assert qzo.load_tokenizer(run).get_vocab() == qzo.load_tokenizer(out).get_vocab()
    of_run, of_export = (qzo.inspect(place).to_json() for place in (run, out))
    assert {**of_run, "model": None} == {**of_export, "model": None} or of_run["reason"] is not None


@pytest.mark.parametrize("kind", ["gptq", "gguf"])
def test_a_loaded_run_is_saved_with_what_it_tuned(runs, tmp_path, input_ids, kind):
    tuned = qzo.load(runs(kind), dequantize=False)
    qzo.save(tuned, tmp_path / "saved")
    saved = next((tmp_path / "saved").glob("*.gguf"), tmp_path / "saved")
    assert torch.equal(logits(qzo.load(saved, dequantize=False), input_ids), logits(tuned, input_ids))


def test_a_run_whose_model_moved_or_changed_is_refused_in_python_as_by_the_commands(runs, tmp_path, input_ids):
    run = shutil.copytree(runs("gptq"), tmp_path / "run")
    moved = shutil.copytree(base_of(run), tmp_path / "moved")
    expected = logits(qzo.load(run), input_ids)
    about = read_run(run)
    (run / "run.json").write_text(json.dumps({**about, "model": str(tmp_path / "gone")}))
    for take in (qzo.load, qzo.inspect, qzo.load_tokenizer):
        with pytest.raises(QzoError, match=r"is not there any more; name the place it moved to: --model PATH \(model="):
            take(run)
        take(run, model=moved)
        with pytest.raises(QzoError, match=r"moved is a model; model= is for a run, whose model moved: leave it out"):
            take(moved, model=moved)
    assert torch.equal(logits(qzo.load(run, model=moved), input_ids), expected)
    with pytest.raises(QzoError, match=r'revision="main" is of a hub id, and .*run is a run on this machine; leave'):
        qzo.load(run, revision="main")
    raw = load_file(moved / "model.safetensors")
    raw["model.norm.weight"][0] += 1
    save_file(raw, moved / "model.safetensors", {"format": "pt"})
    for take in (qzo.load, qzo.inspect, qzo.load_tokenizer):
        with pytest.raises(QzoError, match=r"moved is another model \(.*\); tuned tensors fit the model they"):
            take(run, model=moved)


def test_a_model_with_a_file_named_as_that_of_a_run_is_a_model(runs, tmp_path, input_ids):
    model = shutil.copytree(base_of(runs("gptq")), tmp_path / "model")
    before = logits(qzo.load(model), input_ids)
    shutil.copy(runs("gptq") / "run.json", model)
    assert torch.equal(logits(qzo.load(model), input_ids), before)


def test_a_run_of_adapters_loads_with_them(runs, tmp_path, input_ids):
    run = runs("lora")
    qzo.export(run, tmp_path / "adapters")
    model = PeftModel.from_pretrained(qzo.load(base_of(run)), tmp_path / "adapters").eval()
    assert torch.equal(logits(qzo.load(run), input_ids), logits(model, input_ids))
    with pytest.raises(QzoError, match=r"model.save_pretrained\(folder\) writes the adapters"):
        qzo.save(qzo.load(run), tmp_path / "out")


# commands


@pytest.mark.parametrize("kind", ["mezo", "ft", "gguf"])
def test_a_run_is_quantized_as_its_export_is(runs, tmp_path, capsys, kind):
    run, out = runs(kind), tmp_path / ("out.gguf" if kind == "gguf" else "out")
    qzo.export(run, out)
    for place, name in ((run, "of_run"), (out, "of_export"), (base_of(run), "of_base")):
        says(capsys, 0, "quantize", place, tmp_path / name, "--group-size", "32")
    found = {name: load_file(tmp_path / name / "model.safetensors") for name in ("of_run", "of_export", "of_base")}
    if kind != "ft":  # trained in float32, exported in the dtype of the model
        assert standin.same(found["of_run"], found["of_export"])
    assert not standin.same(found["of_run"], found["of_base"])
    assert qzo.load_tokenizer(tmp_path / "of_run").get_vocab() == qzo.load_tokenizer(out).get_vocab()


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_are_no_part_of_a_model_and_what_to_do_with_them_is_told(runs, tmp_path, capsys, rising, kind):
    told = "OUT writes them: merge them with peft (merge_and_unload), and"
    assert told in says(capsys, 2, "quantize", runs(kind), tmp_path / "out")
    assert told in says(capsys, 2, *train(runs(kind), tmp_path / "out", method=kind))
    assert not (tmp_path / "out").exists()


def test_commands_take_a_run_whose_model_moved_and_refuse_one_whose_model_changed(runs, tmp_path, capsys, rising):
    run = shutil.copytree(runs("mezo"), tmp_path / "run")
    moved = shutil.copytree(base_of(run), tmp_path / "moved")
    (run / "run.json").write_text(json.dumps({**read_run(run), "model": str(tmp_path / "gone")}))
    quantize, again = (
        ["quantize", run, tmp_path / "out", "--group-size", "32"],
        train(run, tmp_path / "next", method="mezo"),
    )
    for command in (quantize, again):
        assert "is not there any more; name the place it moved to: --model" in says(capsys, 2, *command)
        plain = [word if word is not run else moved for word in command] + ["--model", moved]
        assert "--model is for a run whose model moved" in says(capsys, 2, *plain)
        says(capsys, 0, *command, "--model", moved)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "next")
    raw = load_file(moved / "model.safetensors")
    raw["model.norm.weight"][0] += 1
    save_file(raw, moved / "model.safetensors", {"format": "pt"})
    for command in (quantize, again):
        assert "moved is another model" in says(capsys, 2, *command, "--model", moved)
    assert not (tmp_path / "out").exists() and not (tmp_path / "next").exists()


def test_a_journal_of_a_loaded_run_is_replayed_on_that_run_and_on_nothing_else(runs, tmp_path, capsys, input_ids):
    run = runs("gptq")
    model = qzo.load(run)
    optimizer = qzo.QZO(qzo.scales(model), lr=1e-3)
    with qzo.Journal(tmp_path / "run.journal", model, optimizer) as journal:
        journal.resume()
        optimizer.step(lambda: qzo.label_loss(model, input_ids=input_ids, labels=input_ids))
        journal.record()
    says(capsys, 0, "replay", run, tmp_path / "run.journal", tmp_path / "out")
    assert torch.equal(logits(qzo.load(tmp_path / "out"), input_ids), logits(model, input_ids))
    refused = says(capsys, 2, "replay", base_of(run), tmp_path / "run.journal", tmp_path / "other")
    assert "is the journal of another model" in refused


def test_a_journal_knows_what_a_run_had_tuned_of_tensors_that_it_does_not_train(runs, tmp_path, input_ids):
    run = runs("mezo")

    def made(source):
        model = qzo.load(source)
        model.model.embed_tokens.weight.data.zero_()  # what is trained is the same, all else is the run's
        return model, qzo.MeZO({"model.embed_tokens.weight": model.model.embed_tokens.weight}, lr=1e-3)

    model, optimizer = made(run)
    with qzo.Journal(tmp_path / "run.journal", model, optimizer) as journal:
        journal.resume()
        optimizer.step(lambda: qzo.label_loss(model, input_ids=input_ids, labels=input_ids))
        journal.record()
    for source, fits in ((run, True), (base_of(run), False)):
        model, optimizer = made(source)
        if fits:
            with qzo.Journal(tmp_path / "run.journal", model, optimizer) as journal:
                assert journal.resume() == 1
        else:
            with pytest.raises(QzoError, match=r"was begun on .* the codes are the same, other tensors are not"):
                qzo.Journal(tmp_path / "run.journal", model, optimizer)


# training goes on from a run


@pytest.mark.parametrize(("kind", "layers"), [("gptq", "1-1"), ("gguf", "0-0"), ("mezo", "1-1")])
def test_a_run_begun_on_a_run_is_whole_when_that_one_is_gone(runs, tmp_path, capsys, rising, input_ids, kind, layers):
    first = shutil.copytree(runs(kind), tmp_path / "first")
    base, second, method = base_of(first), tmp_path / "second", METHODS[kind]
    options = {"method": method}
    begun = logits(read_tuned(first).load(), input_ids)
    says(capsys, 0, *train(first, second, "--layers", layers, **options))
    straight = {file.name: file.read_bytes() for file in second.iterdir()}
    shutil.rmtree(second)
    rising.evaluate = stopping(rising.evaluate)
    assert main([str(word) for word in train(first, second, "--layers", layers, **options)]) == 2
    shutil.rmtree(first)
    says(capsys, 0, *train(base, second, "--layers", layers, "--resume", **options))
    for name in ("run.journal", "best.safetensors", "start.safetensors"):
        assert (second / name).read_bytes() == straight[name], name
    tuned = read_tuned(second)
    assert tuned.model == base and set(tuned.tensors) < set(tuned.start)
    assert torch.equal(logits(tuned.untuned().eval(), input_ids), begun)
    after = logits(tuned.load(), input_ids)
    assert not torch.equal(after, begun)
    assert torch.equal(logits(read_tuned(second, "last").load(), input_ids), after)
    says(capsys, 0, "export", second, out := tmp_path / ("out.gguf" if kind == "gguf" else "out"))
    assert torch.equal(logits(qzo.load(out, dequantize=method != "qzo"), input_ids), after)
    third = tmp_path / "third"
    says(capsys, 0, *train(second, third, **options))
    assert standin.same(read_tuned(third).start, tuned.whole)


def stopping(evaluate):
    """An evaluation that fails at the second validation: a test and a validation come before the first step."""
    calls = iter(range(100))

    def run(*arguments, **named):
        if next(calls) == 2:
            raise QzoError("stopped here")
        return evaluate(*arguments, **named)

    return run


def test_a_run_goes_on_from_no_other_state_than_it_was_begun_on(runs, tmp_path, capsys, rising):
    first, second = shutil.copytree(runs("gptq"), tmp_path / "first"), tmp_path / "second"
    says(capsys, 0, *train(first, second))
    more = ["--steps", "4", "--resume"]
    plain = tmp_path / "plain"
    says(capsys, 0, *train(base_of(first), plain))
    assert f"was begun on {base_of(first)}, not on a run; give that" in says(capsys, 2, *train(first, plain, *more))
    says(capsys, 0, *train(base_of(first), first, *more))  # its best state is another one from now on
    refused = says(capsys, 2, *train(first, second, *more))
    assert f"first holds another state than the run was begun on; give {base_of(first)}, and it goes on" in refused
    says(capsys, 0, *train(base_of(first), second, *more))
    torn = load_file(second / "start.safetensors")
    save_file({name: tensor + 1 for name, tensor in torn.items()}, second / "start.safetensors")
    assert "start.safetensors is not what the run was begun on; restore it" in says(
        capsys, 2, "export", second, tmp_path / "out"
    )


def test_adapters_of_a_run_begun_on_a_run_are_told_to_be_for_its_state(runs, tmp_path, capsys, rising, input_ids):
    says(capsys, 0, *train(runs("mezo"), tmp_path / "second", method="lora"))
    assert "begun on a run: its adapters are for" in says(capsys, 0, "export", tmp_path / "second", tmp_path / "out")
    adapted = PeftModel.from_pretrained(qzo.load(runs("mezo")), tmp_path / "out").eval()
    assert torch.equal(logits(adapted, input_ids), logits(qzo.load(tmp_path / "second"), input_ids))


# the Trainer


def trainer(model, folder, steps):
    arguments = {**trainer_lives.OPTIONS, "max_steps": steps, "load_best_model_at_end": False}
    layer = {name: scale for name, scale in qzo.scales(model).items() if ".layers.1." in name}
    optimizer = qzo.QZO(layer, lr=5e-3)
    return qzo.QZOTrainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=trainer_lives.dataset("train"),
        eval_dataset=trainer_lives.dataset("validation"),
        optimizers=(optimizer, None),
    )


def test_checkpoints_of_a_trainer_on_a_run_hold_what_that_had_tuned(runs, tmp_path, input_ids):
    run, folder = shutil.copytree(runs("gptq"), tmp_path / "run"), tmp_path / "out"
    model = qzo.load(run)
    assert set(origin_of(model).tuned) == set(read_tuned(run).tensors)
    trainer(model, folder, 2).train()
    after = logits(model, input_ids)
    assert torch.equal(logits(qzo.load(folder / "checkpoint-2"), input_ids), after)
    qzo.export(folder / "checkpoint-2", tmp_path / "exported")
    assert torch.equal(logits(qzo.load(tmp_path / "exported"), input_ids), after)
    resumed = qzo.load(base_of(run))
    trainer(resumed, folder, 2).train(resume_from_checkpoint=True)
    assert torch.equal(logits(resumed, input_ids), after)
