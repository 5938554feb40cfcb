"""bitsandbytes checkpoints through load, the commands and export; special layouts, and folders that are refused."""

import json
import random
import resource
import sys

import pytest
import standin
import torch
from bnb_files import library_logits, quantized, read_bnb, stored, write_bnb
from safetensors.torch import load_file, save_file
from task_files import make_model as make_task_model
from task_files import make_tokenizer, write_task
from test_damaged import configure, mutate, mutated_json
from torch import nn
from transformers import TrainingArguments

import qzo
from qzo import QZO, QzoError, export, load, scales, tasks
from qzo.bnb_nesting import nest
from qzo.bnb_state import parse_state
from qzo.cli import main
from qzo.export import write_checkpoint
from qzo.inspection import inspect
from qzo.scales import quantized_bytes
from qzo.trainable import trainable

pytest.importorskip("bitsandbytes")
Q_PROJ = "model.layers.0.self_attn.q_proj"
STATE = f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture
def write(make_model, tmp_path):
    """`write(kind, family, **options)`: a checkpoint of a tiny model."""

    def make(kind="nf4", family="llama", **options):
        if not (tmp_path / family).exists():
            make_model(family).save_pretrained(tmp_path / family)
            standin.write_tokenizer(tmp_path / family)
        return write_bnb(tmp_path / family, tmp_path / f"{family}-{kind}", kind, **options)

    return make


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def put(folder, **parts):
    """Replace tensors of one layer; None removes one. A "__" in a name stands for a dot."""
    tensors = tensors_of(folder)
    for part, tensor in parts.items():
        name = f"{Q_PROJ}.{part.replace('__', '.')}"
        tensors.pop(name, None)
        tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def put_state(folder, text):
    tensors = tensors_of(folder) | {STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_state(**changes):
    def change(folder):
        state = json.loads(bytes(tensors_of(folder)[STATE].tolist())) | changes
        put_state(folder, json.dumps(state))

    return change


def lose_state(folder):
    tensors = tensors_of(folder)
    del tensors[STATE]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


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
    expected, tensors = library_logits(folder, input_ids), tensors_of(folder)
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
    command = ["train", str(folder), "--task", "words", "--steps", "4", "--lr", "1e-4", "--relative"]
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


def floats(*shape):
    return torch.zeros(shape)


def settings(**changes):
    return lambda folder: configure(folder, lambda config: config["quantization_config"].update(changes))


DAMAGE = {
    "quant_state has shape=[4611686018427387904, 2], but config.json implies [64, 64]": change_state(shape=[2**62, 2]),
    "quant_state has shape=[64], not two positive": change_state(shape=[64]),
    "quant_state has shape=[64, -64], not two": change_state(shape=[64, -64]),
    "quant_state has shape=[64, True], not two": change_state(shape=[64, True]),
    "quant_state has blocksize=0; need 32 or 64": change_state(blocksize=0),
    "quant_state has blocksize=64.0; need": change_state(blocksize=64.0),
    "absmax is F32 (64,), but config.json and quant_state imply F32 (128,)": change_state(blocksize=32),
    "quant_state has dtype='os.system'; need float32 or": change_state(dtype="os.system"),
    "quant_state has quant_type='fp4'; need nf4": change_state(quant_type="fp4"),
    "absmax is F32 (64,), but config.json and quant_state imply U8 (64,)": change_state(
        nested_blocksize=256, nested_dtype="float32", nested_offset=0.1
    ),
    "quant_state has nested_blocksize=2; need 256": change_state(nested_blocksize=2, nested_offset=0.1),
    "quant_state has nested_offset=inf, not a finite": change_state(
        nested_blocksize=256, nested_dtype="float32", nested_offset=float("inf")
    ),
    "quant_state is no JSON": lambda folder: put_state(folder, "{"),
    "quant_state is no JSON ": lambda folder: put_state(folder, "[" * 4000),
    "quant_state is not a JSON object": lambda folder: put_state(folder, "[]"),
    "is U8 (5000,); it is no quant_state": lambda folder: put_state(folder, " " * 5000),
    "weight is U8 (2048, 2), but": lambda folder: put(folder, weight=torch.zeros(2048, 2, dtype=torch.uint8)),
    "quant_map is F32 (15,), but": lambda folder: put(folder, weight__quant_map=floats(15)),
    f"{Q_PROJ}.weight.quant_map is missing": lambda folder: put(folder, weight__quant_map=None),
    "it is not quantized to 4 bits, as config.json says": lose_state,
    "weight.nested_absmax is not one of its tensors": lambda folder: put(folder, weight__nested_absmax=floats(1)),
    "its scales are not all finite": lambda folder: put(folder, weight__absmax=floats(64) + torch.nan),
    "is BF16: a CPU kernel of bitsandbytes rewrote it": lambda folder: put(
        folder, weight__absmax=torch.zeros(1, 64, dtype=torch.bfloat16)
    ),
    "it is not quantized to 8 bits, as config.json says": settings(load_in_4bit=False, load_in_8bit=True),
    "must have one of load_in_4bit and load_in_8bit": settings(load_in_8bit=True),
    "must have one of load_in_4bit and load_in_8bit ": settings(load_in_4bit="yes"),
    'bnb_4bit_quant_type="nf5" is not supported': settings(bnb_4bit_quant_type="nf5"),
    "but config.json implies [64, 32]": lambda folder: configure(
        folder, lambda config: config.update(hidden_size=32, head_dim=16)
    ),
    "the model has no layer model.layers.1": lambda folder: configure(
        folder, lambda config: config.update(num_hidden_layers=1)
    ),
}
INT8 = {
    "SCB is F32 (63,), but config.json and quant_state imply F32 (64,)": lambda folder: put(folder, SCB=floats(63)),
    "weight is F32 (64, 64), but": lambda folder: put(folder, weight=floats(64, 64)),
    "weight_format is 2; only 0, row by row, is known": lambda folder: put(
        folder, weight_format=torch.tensor(2, dtype=torch.uint8)
    ),
    "weight is I8 (64, 64), but config.json implies F16 (64, 64)": lambda folder: put(folder, SCB=None),
    "its scales are not all finite": lambda folder: put(folder, SCB=floats(64) + torch.inf),
}
CASES = [("nf4", *case) for case in DAMAGE.items()] + [("int8", *case) for case in INT8.items()]


@pytest.mark.parametrize(("kind", "message", "damage"), CASES, ids=lambda value: value if type(value) is str else "")
def test_damage_is_told_in_one_line_with_exit_code_two(write, tmp_path, capsys, kind, message, damage):
    folder = write(kind)
    damage(folder)
    with pytest.raises(QzoError) as caught:
        load(folder)
    assert message.strip() in str(caught.value) and "\n" not in str(caught.value)
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {caught.value}"]
    reason = inspect(folder).reason
    only_data_is_wrong = message.startswith(("its scales", "weight_format"))
    assert reason is None if only_data_is_wrong else "\n" not in reason


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_mutations_of_header_configuration_and_quant_state_never_crash(write, kind):
    folder, dice = write(kind), random.Random(kind)
    original = {file: file.read_bytes() for file in folder.iterdir()}
    tensors = tensors_of(folder)
    states = sorted(name for name in tensors if "quant_state" in name)
    load(folder)  # what is imported now is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for turn in range(70):
        if states and turn % 2:
            name = dice.choice(states)
            text = json.dumps(mutated_json(json.loads(bytes(tensors[name].tolist())), dice))
            changed = tensors | {name: torch.tensor(list(text.encode()), dtype=torch.uint8)}
            save_file(changed, folder / "model.safetensors", {"format": "pt"})
        else:
            mutate(folder, dice)
        try:
            load(folder)
        except QzoError as error:
            refused += 1
            assert "\n" not in str(error)
        for file, data in original.items():
            file.write_bytes(data)
    assert 25 < refused < 70
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_a_live_model_with_all_settings_of_transformers_loads_alike(write, tmp_path, input_ids):
    folder = write("nf4-double")
    live = qzo.adopt(quantized(tmp_path / "llama", "nf4-double"))
    loaded = load(folder, torch.float32)
    assert torch.equal(logits(live, input_ids), logits(loaded, input_ids))
    assert all(torch.equal(scale, scales(live)[name]) for name, scale in scales(loaded).items())
