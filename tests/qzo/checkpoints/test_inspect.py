"""`qzo inspect`: what a checkpoint holds, from its configuration and headers alone."""

import json

import pytest
import torch
from awq_files import write_awq
from gguf_files import tiny, write_gguf
from safetensors.torch import load_file, save_file

from qzo import load, quantize, trainable
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.save import save
from qzo.commands.main import main
from qzo.live.scales import quantized_bytes, scales


@pytest.fixture
def make_folder(make_model, tmp_path):
    """`make_folder(kind, family, **options)`: a checkpoint of a tiny model."""

    def make(kind="gptq", family="llama", n_bits=4, group_size=32, checkpoint_format="gptq_v2"):
        model = make_model(family, torch.bfloat16)
        if kind == "awq":
            return write_awq(model, tmp_path / kind, group_size)
        if kind == "plain":
            model.save_pretrained(tmp_path / kind)
        else:
            save(quantize(model, n_bits, group_size), tmp_path / kind, checkpoint_format=checkpoint_format)
        return tmp_path / kind

    return make


@pytest.fixture
def no_data(monkeypatch):
    """No tensor may be read."""

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("qzo.formats.packed.read_tensors_of", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


def reconfigure(folder, quantization=None, **changes):
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "n_bits", "family"),
    [("awq", 4, "llama"), ("awq", 4, "opt"), ("gptq", 2, "gpt2"), ("gptq", 3, "llama"), ("gptq", 8, "mixtral")],
)
def test_counts_and_bytes_are_those_of_the_loaded_model(make_folder, no_data, kind, n_bits, family, monkeypatch):
    folder = make_folder(kind, family, n_bits)
    found = inspect(folder)
    monkeypatch.undo()
    model = load(folder)
    sizes = quantized_bytes(model)
    assert found.reason is None and (found.format, found.n_bits, found.group_size) == (kind, n_bits, 32)
    assert found.version == ("gemm" if kind == "awq" else "gptq_v2")
    for part in ("scales", "codes", "zero_points", "g_idx"):
        assert found.sizes[part] == sizes[part], part
    codes = sum(layer.in_features * layer.out_features for layer in model.modules() if hasattr(layer, "qweight"))
    assert found.counts["scales"] == found.counts["zero_points"] == sizes["scale_count"] == codes // 32
    assert found.counts["codes"] == codes
    for name, count in found.trainable.items():
        assert count == sum(tensor.numel() for group in trainable(model, name) for tensor in group["params"].values())
    assert sum(found.sizes.values()) == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


def test_the_command_prints_a_table_and_writes_json(make_folder, no_data, tmp_path, capsys):
    folder = make_folder("awq")
    assert main(["inspect", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line[:22].rstrip(): line[22:].split() for line in lines}
    assert table["format"] == ["awq,", "gemm"] and table["trains with QZO"] == ["yes"]
    assert table["scales"][-2:] == ["5,376", "bytes"] and table["codes"][0] == "86,016"
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["trains_here"] and record["reason"] is None and record["bytes"]["codes"] == 86016 // 2
    assert record["settings"]["modules_to_not_convert"] is None and record["group_size"] == 32
    assert record["trainable"]["scales"] == record["counts"]["scales"] == 86016 // 32


def test_an_unquantized_folder_is_told_what_to_do(make_folder, no_data, capsys):
    folder = make_folder("plain")
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"no: it is not quantized; first run: qzo quantize {folder} OUT" in out and "scales+" not in out
    reconfigure(folder, model_type="strange", auto_map={"AutoModelForCausalLM": "modeling.Strange"})
    assert "asks for code of its own (auto_map), which is never run" in inspect(folder).reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": 8}, "but config.json implies I32"),
        ({"bits": 5}, "n_bits=5 is not supported"),
        ({"bits": None}, "must have whole numbers bits and group_size"),
        ({"group_size": 64}, "qzeros is I32 (5, 8), but config.json implies I32 (3, 8) (by bits, group_size"),
        ({"group_size": 16}, "but config.json implies"),
        ({"checkpoint_format": "marlin"}, 'checkpoint_format="marlin" is not supported'),
        ({"quant_method": "awq", "version": "gemv"}, 'AWQ version="gemv" is not supported'),
        ({"quant_method": "awq"}, "the model has no tensor model.layers.0.mlp.down_proj.g_idx"),
    ],
)
def test_why_a_checkpoint_cannot_be_trained_is_told(make_folder, no_data, capsys, settings, reason):
    folder = make_folder()
    own = json.loads((folder / "config.json").read_text())["quantization_config"]
    reconfigure(folder, own | settings)
    found = inspect(folder)
    assert reason in found.reason and "\n" not in found.reason
    assert main(["inspect", str(folder)]) == 0
    assert "trains with QZO       no: " in capsys.readouterr().out


def test_tensors_that_are_missing_or_strange_are_the_reason(make_folder, no_data):
    folder = make_folder()
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    reason = inspect(folder).reason
    assert reason is not None and reason.startswith("1 tensors are missing, the first is model.norm.weight; download")
    save_file(tensors | {"model.norm.weight": gone, "strange": gone.clone()}, folder / "model.safetensors")
    assert "the model has no tensor strange" in inspect(folder).reason
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(".qweight")}
    save_file(plain, folder / "model.safetensors")
    reason = inspect(folder).reason
    assert reason is not None and reason.startswith(
        "no tensor holds codes, and config.json says gptq; take config.json"
    )


@pytest.mark.parametrize("kind", ["gptq", "plain", "gguf"])
def test_a_number_that_is_none_is_an_error_after_the_table(make_folder, tmp_path, capsys, kind):
    if kind == "gguf":
        model = write_gguf(tiny(), tmp_path / "tiny.gguf", "Q4_0")
        data = bytearray(model.read_bytes())
        data[-4:] = b"\0\0\xc0\x7f"  # of the last norm
        model.write_bytes(data)
    else:
        model = make_folder(kind)
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"][0] = float("inf")
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert main(["inspect", str(model), "--json", str(tmp_path / "found.json")]) == 2
    shown = capsys.readouterr()
    assert (
        "trains with QZO       no: " in shown.out
        and not json.loads((tmp_path / "found.json").read_text())["trains_here"]
    )
    (error,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert "norm" in error and "NaN or infinite" in error and str(model) in error


@pytest.mark.parametrize("method", ["quanto"])
def test_foreign_formats_show_what_their_configuration_says(make_folder, no_data, capsys, method, tmp_path):
    folder = make_folder("plain")
    (folder / "model.safetensors").rename(folder / "qmodel.pt")
    reconfigure(folder, {"quant_method": method, "nbits": 2, "axis": [0, 1]})
    assert main(["inspect", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["format", method],
        ["quant_method", f'"{method}"'],
        ["nbits", "2"],
        ["axis", "[0,", "1]"],
    ]
    assert lines[-1].__contains__(f"no: the format {method} is not trainable here yet; take a checkpoint of a kind")
    assert json.loads((tmp_path / "found.json").read_text())["settings"]["nbits"] == 2


def test_a_gguf_file_is_taken_apart_as_it_is_trained(tmp_path, capsys):
    file = write_gguf(tiny(), tmp_path / "tiny.gguf", "Q4_1")
    found, model = inspect(file), load(file, dequantize=False)
    parts = quantized_bytes(model)
    assert found.version == "Q4_1" and found.group_size == 32 and found.reason is None
    assert found.counts["scales"] == found.counts["offsets"] == parts["scale_count"]
    assert found.trainable["scales"] == sum(scale.numel() for scale in scales(model).values())
    assert found.trainable["scales+vocabulary"] == parts["scale_count"] > found.trainable["scales"]
    assert {name: found.sizes[name] for name in ("scales", "offsets", "codes")} == {
        name: parts[name] for name in ("scales", "offsets", "codes")
    }
    assert main(["inspect", str(file)]) == 0
    assert "minima move with their scales" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["F32", "Q6_K"])
def test_a_gguf_file_without_scales_to_train_says_so(tmp_path, kind):
    file = write_gguf(tiny(hidden=256), tmp_path / "tiny.gguf", kind)
    assert inspect(file).reason.startswith("no layer has scales that are not quantized themselves")


@pytest.mark.parametrize("case", ["nowhere", "empty", "truncated", "pickle", "gguf", "damaged", "json", "config"])
def test_wrong_input_is_one_line_and_exit_code_two(make_folder, tmp_path, capsys, case):
    folder, options = make_folder(), []
    if case == "nowhere":
        folder = tmp_path / "nowhere"
    elif case == "empty":
        (folder / "config.json").unlink()
    elif case == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    elif case == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif case == "gguf":
        folder = tmp_path / "nowhere.gguf"
    elif case == "damaged":
        folder = tmp_path / "damaged.gguf"
        folder.write_bytes(b"GGUF" + bytes(30))
    elif case == "json":
        options = ["--json", str(tmp_path / "nowhere/found.json")]
    else:
        reconfigure(folder, ["gptq"])
    assert main(["inspect", str(folder), *options]) == 2
    caught = capsys.readouterr()
    lines = [line for line in caught.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in caught.err and not caught.out
