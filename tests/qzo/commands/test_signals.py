"""Signals and readers that go away: what was done is saved, how to go on is said, exit codes are those of the shell."""

import os
import signal
import sys

import pytest
import standin
import torch
from crashes import alive
from standin import metrics
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from qzo.commands.main import main
from qzo.durable import read_tensors
from qzo.signals import Interrupted, held, interruptible

TRAIN = [*standin.PAPER, "--batch-size", "4", "--steps", "6", "--eval-every", "3", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", False), dtype=torch.bfloat16).eval()
    return {
        method: standin.write_model(model, place / method, quantized) for method, quantized in (("ft", 0), ("qzo", 1))
    }


def at_call(function, wanted, number):
    """The function, which sends this process a signal in its call number `wanted`."""
    calls = 0

    def call(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == wanted:
            signal.raise_signal(number)
        return function(*arguments, **named)

    return call


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("method", "calls"), [("qzo", 13), ("ft", 5)])  # in the fifth step, at a loss
def test_a_training_that_gets_a_signal_saves_and_goes_on_to_the_same_end(
    task, models, tmp_path, monkeypatch, number, code, method, calls
):
    command = ["train", str(models[method]), *TRAIN, "--method", method, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    loss = task.loss

    def signalled():
        task.loss = at_call(loss, calls, number)
        return main([*command, str(tmp_path / "cut")])

    ended, text = alive(signalled)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    done = int(lines[0].split()[3])
    assert ended == code and lines == [f"error: stopped after {done} steps; go on with --resume"] and 3 < done < 6
    assert main([*command, str(tmp_path / "cut"), "--resume"]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    for name in ("best.safetensors", "run.journal" if method == "qzo" else "last.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if method == "ft":
        assert read_tensors(tmp_path / "cut/last.safetensors")[1]["steps"] == "6"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_of_a_training_nothing_is_left(task, models, tmp_path, monkeypatch, number, code):
    import safetensors.torch

    def signalled():
        safetensors.torch.save_file = at_call(safetensors.torch.save_file, 1, number)
        return main(["quantize", str(models["ft"]), str(tmp_path / "out"), "--group-size", "32"])

    ended, text = alive(signalled)
    assert ended == code and "error: interrupted; nothing is left half written" in text and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_a_signal_waits_while_something_is_held():
    seen = []
    with pytest.raises(Interrupted) as caught, interruptible():
        with held():
            signal.raise_signal(signal.SIGTERM)
            with held():
                seen.append("inside")
            seen.append("still")
        seen.append("never")
    assert seen == ["inside", "still"] and caught.value.number == signal.SIGTERM
    with interruptible(), pytest.raises(ValueError), held():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def without_readers(numbers, command):
    """Exit code and all else that a command prints where what is read from these outputs is gone from the start."""

    def work():
        for number in numbers:
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        return main(command)

    return alive(work)


def test_a_reader_that_goes_away_neither_ends_a_training_nor_is_an_error(task, models, tmp_path):
    assert without_readers((1, 2), ["train", str(models["qzo"]), *TRAIN, "--out", str(tmp_path / "run")])[0] == 0
    assert (tmp_path / "run/result.json").exists()
    assert without_readers((1,), ["inspect", str(models["qzo"])]) == (0, "")  # as `| head -1`


def test_a_full_disk_behind_standard_output_is_one_line(models):
    def work():
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        return main(["inspect", str(models["qzo"])])

    code, text = alive(work)
    assert code == 2 and "No space left on device" in text and "Traceback" not in text
