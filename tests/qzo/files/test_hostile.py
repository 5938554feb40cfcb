"""Checkpoints made to hang a reader, to fill its memory or to fetch code: refused at once, in one line.

`make attack` reads each of these, and larger ones, in a process of its own, by every command.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time

import hostile
import pytest
import torch
from gguf_files import tiny, write_gguf
from safetensors.torch import load_file
from tiny_models import write_plain

from qzo import QzoError, load, quantize
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.load import load_tokenizer
from qzo.checkpoints.save import save
from qzo.files.budget import at_most, check_counts
from qzo.models.build import config_of

FOLDERS = {name: change for name, change in hostile.FOLDERS.items() if "tokenizer" not in name}
GGUF = {**hostile.GGUF, **hostile.GGUF_NODES}


class Hung(BaseException):
    """Beyond every `except Exception`."""


@pytest.fixture(autouse=True)
def guarded():
    """Ends a test that hangs, and fails one that takes half a gigabyte."""

    def hung(*_):
        raise Hung

    previous, peak = signal.signal(signal.SIGALRM, hung), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500 * 1024  # KiB


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Kind -> sound checkpoint; each read once, so that what is imported then is not counted."""
    folder = tmp_path_factory.mktemp("sound")
    plain = write_plain("llama", folder / "plain")
    save(quantize(load(plain), 4, 32), folder / "gptq")
    (folder / "gguf").mkdir()
    found = {"plain": plain, "gptq": folder / "gptq"}
    found["gguf"] = write_gguf(tiny(), folder / "gguf" / "model.gguf", "Q4_0")
    for path in found.values():
        load(path), inspect(path)
    return found


def refused(read, path):
    start = time.monotonic()
    with pytest.raises(QzoError) as caught:
        read(path)
    assert str(caught.value).isprintable() and time.monotonic() - start < 5
    return str(caught.value)


def told(path):
    """What an inspection says, as an error."""
    found = inspect(path)
    if found.reason and "first run: qzo quantize" not in found.reason:
        raise QzoError(found.reason)


@pytest.mark.parametrize("kind", ["gptq", "plain"])
def test_hostile_folders(originals, tmp_path, kind):
    for number, (name, change) in enumerate(FOLDERS.items()):
        folder = shutil.copytree(originals[kind], tmp_path / str(number))
        change(folder)
        for read in (load, told):
            message = refused(read, folder)
        kinds = [word for word in ("FIFO", "socket", "device") if word in name]
        assert all(f"is a {word}; only regular files are read" in message for word in kinds), message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "additional_chat_templates/x.jinja"])
def test_a_tokenizer_is_not_waited_for(originals, tmp_path, name):
    folder = shutil.copytree(originals["plain"], tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    hostile.os.mkfifo(folder / name)
    assert "is a FIFO" in refused(load_tokenizer, folder)
    file = shutil.copytree(originals["gguf"].parent, tmp_path / "gguf") / "model.gguf"
    hostile.os.mkfifo(file.parent / "tokenizer_config.json")
    assert "is a FIFO" in refused(load_tokenizer, file)
    load(file)  # which reads nothing beside it


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_key_that_is_said_twice_with_two_values_is_refused(originals, tmp_path, name):
    """Of readers, some take the first value and some the last."""
    folder = shutil.copytree(originals["plain"], tmp_path / "model")
    text = (folder / name).read_text() if (folder / name).exists() else "{}"
    for values, is_refused in (((1, 1), False), ((1, 2), True), ((1, True), True)):
        said = "".join(f'"said": {json.dumps(value)}, ' for value in values)
        (folder / name).write_text("{" + (said + text.strip()[1:] if len(text) > 2 else said[:-2] + "}"))
        if is_refused:
            assert f"{name}: 'said' stands there twice, with two values; leave" in refused(load, folder)
        else:
            load(folder)


def test_hostile_gguf_files(originals, tmp_path):
    for number, change in enumerate(GGUF.values()):
        file = shutil.copytree(originals["gguf"].parent, tmp_path / str(number)) / "model.gguf"
        change(file)
        for read in (load, told, lambda path: load(path, dequantize=False)):
            refused(read, file)


def test_of_other_architectures_too_nothing_is_built_that_a_file_does_not_hold(originals, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(originals["gguf"].read_bytes().replace(b"llama", b"bloom"))  # which transformers reads, not we
    hostile.set_value("bloom.embedding_length", 4, (2**24).to_bytes(4, "little"))(file)
    assert "its configuration implies more than" in refused(load, file)


@pytest.mark.parametrize("name", list(hostile.PICKLES))
def test_hostile_pickles(originals, tmp_path, name):
    pytest.importorskip("hqq")
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((originals["plain"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    tensors = load_file(originals["plain"] / "model.safetensors")
    state = {"model.layers.0.mlp.up_proj": {"W_q": tensors["model.layers.0.mlp.up_proj.weight"]}}
    torch.save(state, folder / "qmodel.pt")
    hostile.PICKLES[name](folder)
    message = refused(load, folder)
    assert message.removeprefix(f"{folder}: ") == refused(told, folder).removeprefix(f"{folder}: ")


def test_code_on_the_hub_is_not_asked_for(originals, tmp_path):
    folder = shutil.copytree(originals["plain"], tmp_path / "model")
    expected = load(folder)(torch.arange(8)[None]).logits
    (folder / "other.safetensors").write_bytes(b"")
    keys = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
    hostile.set_config(**dict.fromkeys(keys, "owner/kernel"), transformers_weights="other.safetensors")(folder)
    config = config_of(folder)
    assert config._attn_implementation is None and config._experts_implementation is None
    assert torch.equal(load(folder)(torch.arange(8)[None]).logits, expected)


@pytest.mark.parametrize("key", ["num_labels", "num_blocks", "num_layers_per_stack", "decoder_layers", "depths"])
def test_counts_of_whatever_name_and_depth_have_an_end(tmp_path, key):
    for config in ({key: 10**9}, {"text_config": {key: 10**9}}, {"vision_config": {"inner": [{key: [2, 10**9]}]}}):
        with pytest.raises(QzoError, match=f"{key}=1000000000"):
            check_counts(tmp_path, config, 100)
    check_counts(tmp_path, {key: 24, "vision_config": {key: 10**5}, "rope_theta": 10**12, "max_tokens": 10**9}, 100)


def test_a_model_is_built_no_further_than_its_files_reach():
    built = []
    with (
        pytest.raises(QzoError, match="more than 1,400 parameters, but the files hold 100 tensors"),
        at_most(10**9, 100),
    ):
        for _ in range(10**6):
            built.append(torch.nn.LayerNorm(2, device="meta"))
    assert len(built) == 700
    with pytest.raises(QzoError, match="more than 400 weights"), at_most(100, 100):
        torch.nn.Linear(20, 21, device="meta")
    torch.nn.Linear(20, 21, device="meta")  # afterwards as before
