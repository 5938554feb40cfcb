"""bitsandbytes checkpoints through load, the commands and export; special layouts."""

import json
import sys

import pytest
import standin
import torch
from bnb_files import library_logits, quantized, read_bnb, stored, write_bnb, writer
from safetensors.torch import save_file
from task_files import make_model as make_task_model
from task_files import make_tokenizer, write_task
from torch import nn
from transformers import TrainingArguments

import qzo
from qzo import QZO, QzoError, export, load, scales, tasks
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.write import write_checkpoint
from qzo.commands.main import main
from qzo.formats.bnb.nesting import nest
from qzo.formats.bnb.state import parse_state
from qzo.live.scales import quantized_bytes
from qzo.live.trainable import trainable

pytest.importorskip("bitsandbytes")
Q_PROJ = "model.layers.0.self_attn.q_proj"
STATE = f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture
def write(make_model, tmp_path):
    return writer(make_model, tmp_path)


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_the_model_is_the_librarys_to_the_bit_in_fp32_and_near_in_bf16(write, input_ids, kind, dtype):
    """By default the library multiplies a bf16 model in fp32."""
    folder = write(kind, dtype=dtype)
    expected, model = logits(read_bnb(folder), input_ids), load(folder)
    assert expected.dtype == next(model.parameters()).dtype == dtype
    atol = 0 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(logits(model, input_ids), expected, rtol=0, atol=atol)


def test_conv1d_layers_left_out_layers_and_a_quantized_head_are_known(write, input_ids):
    for folder, count in (
        (write("nf4", "gpt2"), 8),
        (write("int8", "llama", llm_int8_skip_modules=["o_proj", "up_proj", "lm_head"]), 10),
        (write("nf4", "opt", llm_int8_skip_modules=["fc1"]), 11),
    ):
        model = load(folder, torch.float32)
        assert torch.equal(logits(model, input_ids), library_logits(folder, input_ids))
        assert len(scales(model)) == count and inspect(folder).layers == count
    assert type(model.model.decoder.layers[0].fc1) is nn.Linear
    assert type(model.lm_head).__name__ == "BnbLinear4bit"


def test_shards_and_other_storage_types_are_read_and_written(write, input_ids, tmp_path):
    folder = write("nf4-double", bnb_4bit_quant_storage="float16")
    expected, tensors = library_logits(folder, input_ids), stored(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{n}.safetensors": names[n::3] for n in range(3)}  # the parts of a layer end up in several
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load(folder, torch.float32)
    assert torch.equal(logits(model, input_ids), expected)
    tuned = {name: scale * 1.01 for name, scale in scales(model).items()}
    write_checkpoint(folder, tuned, tmp_path / "out")
    again = load(tmp_path / "out", torch.float32)
    for name, scale in scales(again).items():
        torch.testing.assert_close(scale, tuned[name], rtol=0, atol=0.01 * float(tuned[name].max()))


def test_only_layers_that_changed_are_nested_again_and_as_the_library_does_it(write, tmp_path):
    folder = write("nf4-double")
    live, before = scales(load(folder)), stored(folder)
    assert write_checkpoint(folder, live, tmp_path / "same") == len(live)
    assert (tmp_path / "same/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    live[f"{Q_PROJ}.scales"][5] *= 1.25
    write_checkpoint(folder, live, tmp_path / "one")
    after = stored(tmp_path / "one")
    own = {name for name in after if not torch.equal(after[name], before[name])}
    assert own == {f"{Q_PROJ}.weight.absmax", f"{Q_PROJ}.weight.nested_absmax", STATE}
    codes, absmax, offset = nest(live[f"{Q_PROJ}.scales"], before[f"{Q_PROJ}.weight.nested_quant_map"])
    assert torch.equal(after[f"{Q_PROJ}.weight.absmax"], codes)
    assert torch.equal(after[f"{Q_PROJ}.weight.nested_absmax"], absmax)
    assert json.loads(bytes(after[STATE].tolist()))["nested_offset"] == offset


def test_a_quant_state_is_written_as_the_library_writes_it(write):
    for kind in ("nf4", "nf4-double"):
        text = bytes(stored(write(kind))[STATE].tolist())
        assert bytes(parse_state(text, "nf4").to_tensor().tolist()) == text


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_commands_and_trainer_keep_the_format(write, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setitem(sys.modules, "qzo.tasks", standin.module())
    folder, run = write(kind), tmp_path / "run"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = ["train", str(folder), *standin.PAPER, "--steps", "4", "--lr", "1e-4", "--relative"]
    assert main([*command, "--out", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--state", "last"]) == 0
    assert main(["replay", str(folder), str(run / "run.journal"), str(tmp_path / "replayed")]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0 and "trains with QZO       yes" in capsys.readouterr().out
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}
    assert (tmp_path / "replayed/model.safetensors").read_bytes() == after["model.safetensors"]
    old, new = stored(folder), stored(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    if kind == "nf4-double":  # small steps may leave all 8-bit codes of a layer as they are, but not the second level
        assert changed >= {name for name in old if name.endswith(("nested_absmax", "__nf4"))}
        assert changed <= {name for name in old if name.endswith(("absmax", "__nf4"))}
    else:
        assert changed == {name for name in old if name.endswith(("absmax", "SCB"))}
    tuned = load(folder)
    qzo.replay(tuned, run / "run.journal")
    if kind != "nf4-double":
        assert all(torch.equal(scale, scales(tuned)[name]) for name, scale in scales(load(tmp_path / "out")).items())
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    row = torch.arange(5, 13)
    arguments = TrainingArguments(str(tmp_path / "trainer"), **options)
    trainer = qzo.QZOTrainer(load(folder), arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert stored(tmp_path / "saved").keys() == old.keys() and inspect(tmp_path / "saved").reason is None
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_eval_scores_such_a_folder(tmp_path, kind):
    tokenizer = make_tokenizer()
    make_task_model(len(tokenizer)).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    folder = write_bnb(tmp_path / "plain", tmp_path / "model", kind)
    command = ["eval", str(folder), "--data", str(write_task(tmp_path / "data", "sst2")), "--task", "sst2"]
    assert main([*command, "--dtype", "float32", "--json", str(tmp_path / "result.json")]) == 0
    encoder = tasks.Encoder(tasks.get("sst2", tmp_path / "data"), tokenizer)
    expected = tasks.evaluate(read_bnb(folder), encoder, encoder.task.splits(0)["test"])
    found = json.loads((tmp_path / "result.json").read_text())
    rounded_activations = 0.02  # of int8 in eval mode
    assert found["loss"] == pytest.approx(expected["loss"], rel=rounded_activations if kind == "int8" else 1e-5)
    assert found["count"] == expected["count"]


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_inspection_counts_what_is_loaded(write, kind):
    folder = write(kind)
    found, model = inspect(folder), load(folder, torch.float32)
    sizes = quantized_bytes(model)
    assert found.reason is None and found.format == "bitsandbytes" and found.layers == 14
    assert found.version == {"nf4": "nf4", "nf4-double": "nf4, double quantization", "int8": "int8"}[kind]
    assert (found.n_bits, found.group_size) == ((8, -1) if kind == "int8" else (4, 64))
    assert found.counts["scales"] == sizes["scale_count"] and found.sizes["codes"] == sizes["codes"]
    assert found.counts["codes"] == 86016
    if kind != "nf4-double":
        assert found.sizes["scales"] == sizes["scales"]
    for name, count in found.trainable.items():
        assert count == sum(tensor.numel() for group in trainable(model, name) for tensor in group["params"].values())
    assert sum(found.sizes.values()) == sum(tensor.nbytes for tensor in stored(folder).values())


def test_nothing_but_nesting_anew_needs_the_library(write, input_ids, tmp_path, monkeypatch):
    folders = {kind: write(kind) for kind in ("nf4", "nf4-double", "int8")}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for kind, folder in folders.items():
        model = load(folder, torch.float32)
        optimizer = QZO(trainable(model), lr=1e-4)
        optimizer.step(lambda: model(input_ids, labels=input_ids).loss)  # noqa: B023
        export(folder, tmp_path / f"{kind}-copy")
        if kind == "nf4-double":
            with pytest.raises(QzoError, match=f"{folder}: .*: this needs the package bitsandbytes; run: pip install"):
                write_checkpoint(folder, scales(model), tmp_path / kind)
            assert not (tmp_path / kind).exists()
        else:
            write_checkpoint(folder, scales(model), tmp_path / kind)
        with pytest.raises(QzoError, match="pip install bitsandbytes"):
            qzo.release(model)


def test_a_live_model_with_all_settings_of_transformers_loads_alike(write, tmp_path, input_ids):
    folder = write("nf4-double")
    live = qzo.adopt(quantized(tmp_path / "llama", "nf4-double"))
    loaded = load(folder, torch.float32)
    assert torch.equal(logits(live, input_ids), logits(loaded, input_ids))
    assert all(torch.equal(scale, scales(live)[name]) for name, scale in scales(loaded).items())
