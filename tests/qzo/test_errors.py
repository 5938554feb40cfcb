"""Messages that hold names from damaged files: one line, and nothing in them that a terminal would act on."""

import json
import sys
from io import BytesIO, TextIOWrapper

import pytest
from safetensors.torch import save_file
from torch import zeros

from qzo.checkpoints.inspect import inspect
from qzo.commands.inspect import table
from qzo.commands.main import main
from qzo.errors import QzoError, named, printable

HOSTILE = "a\x1b]0;title\x07\n\rerror: b\u2028c\u202ed\x9b2Je\ud800\x7f"
SHOWN = r"a\x1b]0;title\x07\n\rerror: b\u2028c\u202ed\x9b2Je\ud800\x7f"


def test_control_characters_are_shown_escaped_once():
    assert printable(HOSTILE) == SHOWN == printable(SHOWN)
    with pytest.raises(QzoError) as caught, named(HOSTILE), named("outer"):
        raise QzoError(HOSTILE)
    assert str(caught.value) == f"{SHOWN}: outer: {SHOWN}"
    str(caught.value).encode()


@pytest.mark.parametrize("text", ["model.layers.0.µ-proj", "C:\\new\\x1b", "模型 é", ""])
def test_what_is_printable_stays_as_it_is(text):
    assert printable(text) is text and str(QzoError(text)) == text


def test_what_would_help_stays_at_the_end_of_a_message_that_is_cut():
    assert str(QzoError(f"{'x' * 10**6} is no name; take another")).endswith("x is no name; take another")


def test_a_name_of_a_million_characters_is_cut():
    message = str(QzoError(f"{'x' * 10**6} is not known"))
    assert len(message) < 3_000 and " ... " in message


def test_names_of_tensors_keys_and_folders_reach_the_terminal_escaped(tmp_path, capsys):
    folder = tmp_path / "model\x1b[31m\nerror: none"
    folder.mkdir()
    settings = {"quant_method": "x\x1b[2J", "key\x1b[5m\n": "y\x1b"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    save_file({"a\x1b[31m\nb": zeros(2)}, folder / "model.safetensors")
    lines = table(inspect(folder)).splitlines()
    assert main(["inspect", str(folder)]) == 0
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert lines == shown.out.splitlines() and all(line.isprintable() for line in lines)
    assert len(shown.err.splitlines()) == 1 and shown.err.rstrip("\n").isprintable()


def test_a_terminal_without_the_characters_gets_escapes(tmp_path, monkeypatch):
    folder, screen = tmp_path / "modèle", BytesIO()
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "été"}}')
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(screen, "ascii"))
    assert main(["inspect", str(folder)]) == 0
    sys.stdout.flush()
    assert rb"mod\xe8le" in screen.getvalue()
