"""`qzo generate MODEL_OR_RUN`: what a model says, before and after training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from qzo.commands import data
from qzo.commands.moved import add_moved, check_moved
from qzo.errors import QzoError, printable
from qzo.training.settings import DTYPES

Message = dict[str, str]


def add_command(commands: Any) -> None:
    """Add `generate` to the subcommands of a parser."""
    parser = commands.add_parser("generate", help="let a model, or the best state of a run, go on with a text")
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id; of a run, its best state")
    add_moved(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what to go on from; default: all of stdin")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message, in the words of the chat template; without --prompt each line of stdin is one",
    )
    parser.add_argument("--system", metavar="TEXT", help="message of the system in front of a chat")
    parser.add_argument("--before", action="store_true", help="of a run: show what the untuned model says, too")
    parser.add_argument("--max-tokens", type=int, default=256, help="written at most (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share only")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--device", default="cpu", help="where to run (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="of unquantized tensors (default: as load chooses)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the answer, or the answers, to stdout as they come."""
    from qzo.checkpoints.load import load_tokenizer
    from qzo.kernels.rebuilt import kept_weights
    from qzo.tasks.sampled import Sampling
    from qzo.training.tuned.state import is_tuned, read_tuned

    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.seed)
    source = Path(options.model)
    check_moved(options.moved, source, is_tuned(source))
    tuned = read_tuned(source, model=options.moved) if is_tuned(source) else None
    if tuned is None and options.before:
        raise QzoError(f"--before is for a run, and {options.model} is a model; leave it out")
    if options.system is not None and not options.chat:
        raise QzoError("--system is for --chat; leave it out, or chat")
    if options.before and options.chat and options.prompt is None:
        raise QzoError("--before needs one message, to be answered twice: --chat --prompt TEXT")
    device = data.device(options.device)
    tokenizer = load_tokenizer(tuned.model if tuned else options.model)
    if options.chat and not tokenizer.chat_template:
        raise QzoError(f"the tokenizer of {options.model} has no chat template; leave --chat out")
    prompt = options.prompt
    if prompt is None and not options.chat:
        prompt = sys.stdin.read()
    place = tuned.model if tuned else options.model
    for title, model in _models(options, tuned, device):
        if title:
            print(f"{title}: ", end="", flush=True)
        # a .gguf file is read dequantized, so a run of one may take as much
        with kept_weights() if place.lower().endswith(".gguf") else nullcontext():
            if prompt is None:
                _talk(model, tokenizer, options, sampling)
            else:
                _say(model, tokenizer, _asked(tokenizer, options, prompt), sampling, options.chat)


def _models(options: argparse.Namespace, tuned: Any, device: Any) -> Iterator[tuple[str, Any]]:
    """The model that was asked for, behind the one it was tuned from where that is wanted; one at a time."""
    import torch

    from qzo.checkpoints.load import load

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.before:
        yield "before", tuned.untuned(dtype, device).eval()
    model: Any = tuned.load(dtype, device) if tuned else load(options.model, dtype, device).eval()
    yield ("after" if options.before else ""), model


def _asked(tokenizer: Any, options: argparse.Namespace, prompt: str) -> str:
    return _templated(tokenizer, [*_system(options), {"role": "user", "content": prompt}]) if options.chat else prompt


def _system(options: argparse.Namespace) -> list[Message]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _templated(tokenizer: Any, messages: list[Message]) -> str:
    from qzo.errors import is_failure
    from qzo.files.folder import one_line

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except BaseException as error:  # templates are programs, and raise what they like
        if not is_failure(error):
            raise
        raise QzoError(
            f"the chat template refuses these messages: {one_line(error)}; change them, or leave --chat out"
        ) from error


def _say(model: Any, tokenizer: Any, text: str, sampling: Any, whole: bool) -> str:
    """Write what a model says, piece by piece; returns all of it."""
    from qzo.tasks.sampled import write
    from qzo.training.telemetry.progress import tell

    said = ""
    for piece in write(model, tokenizer, text, sampling, whole):
        said += piece
        print("\n".join(map(printable, piece.split("\n"))), end="", flush=True)
    print(flush=True)
    if not said.strip():
        more = "" if whole or not tokenizer.chat_template else "; it is made for chat, which --chat asks for"
        tell(f"notice: the model ended its answer before the first word{more}")
    return said


def _talk(model: Any, tokenizer: Any, options: argparse.Namespace, sampling: Any) -> None:
    """A message a line of stdin, each answered with all before it in view."""
    messages = _system(options)
    for line in sys.stdin:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        said = _say(model, tokenizer, _templated(tokenizer, messages), sampling, whole=True)
        messages.append({"role": "assistant", "content": said})
