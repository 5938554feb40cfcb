"""Greedy answers of an exported GGUF file, by llama.cpp and by `qzo generate`, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qzo.checkpoints.load import load, load_tokenizer
from qzo.errors import QzoError

SCRIPT = Path(__file__).with_name("llamacpp.mjs")
COUNT = 24  # tokens of an answer
Asked = Mapping[str, Any]  # {"text": ...} or {"messages": [...]}


@dataclass
class Compared:
    """Tokens at places where both had the same before them: how many, of them the same, and where not, how much less
    likely (log p) qzo finds llama.cpp's token than its own, at most; answers of `qzo generate` that are llama.cpp's
    up to that place.
    """

    places: int
    same: int
    margin: float
    answers: int
    alike: int


def llamacpp(node: Path, file: Path, asked: Sequence[Asked], count: int, likeliest: int = 1) -> list[Any]:
    """What llama.cpp makes of prompts, see llamacpp.mjs; `node`: where `make test-llamacpp` has it. Raises QzoError."""
    wanted = json.dumps({"model": str(file.resolve()), "prompts": asked, "count": count, "likeliest": likeliest})
    command = ["node", str(SCRIPT), str(node.resolve())]
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QzoError(f"llama.cpp ends with {done.returncode}: {done.stderr.strip()[-300:]}; run it by hand to see")
    return list(json.loads(done.stdout)["answers"])


@torch.no_grad()
def compared(node: Path, file: Path, asked: Sequence[Asked]) -> dict[str, Any]:
    """`Compared`, with the texts that `qzo generate` wrote. Raises QzoError where the two read prompts differently."""
    tokenizer: Any = load_tokenizer(str(file))
    model: Any = load(str(file), torch.float32, dequantize=False).eval()
    found, texts = Compared(0, 0, 0.0, 0, 0), []
    for prompt, answer in zip(asked, llamacpp(node, file, asked, COUNT), strict=True):
        before = _tokens(tokenizer, prompt)
        if answer["tokens"] != before:
            raise QzoError(
                f"{file}: llama.cpp reads {answer['tokens']} where qzo reads {before}; correct the tokenizer first"
            )
        said = [step["token"] for step in answer["steps"]]
        likelihoods = model(torch.tensor([[*before, *said[:-1]]])).logits[0, len(before) - 1 :].log_softmax(-1)
        own = likelihoods.argmax(-1)
        equal = [int(a) == b for a, b in zip(own, said, strict=True)]
        until = equal.index(False) if False in equal else len(said)
        margins = [float(row.max() - row[token]) for row, token in zip(likelihoods, said, strict=True)]
        found.places, found.same = found.places + len(said), found.same + sum(equal)
        found.margin = max(found.margin, *margins)
        texts.append(_generated(file, prompt))
        shared = tokenizer.decode(said[:until], skip_special_tokens=True).strip()
        found.answers, found.alike = found.answers + 1, found.alike + texts[-1].startswith(shared)
    return {**asdict(found), "texts": texts}


def _tokens(tokenizer: Any, prompt: Asked) -> list[int]:
    if "text" in prompt:
        return list(tokenizer.encode(prompt["text"]))
    text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text))


def _generated(file: Path, prompt: Asked) -> str:
    """What `qzo generate` writes. Raises QzoError where it fails."""
    command = [sys.executable, "-m", "qzo", "generate", str(file), "--max-tokens", str(COUNT), "--dtype", "float32"]
    if "messages" in prompt:
        *first, last = [message["content"] for message in prompt["messages"]]
        command += ["--chat", "--prompt", last, *(["--system", first[0]] if first else [])]
    else:
        command += ["--prompt", prompt["text"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QzoError(f"qzo generate ends with {done.returncode}: {done.stderr.strip()}; run it by hand to see")
    return done.stdout.strip()
