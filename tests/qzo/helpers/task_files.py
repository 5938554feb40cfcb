"""Small tasks with made-up content in the original field names, and a tokenizer and a model that fit them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CREATURES = ("badger", "heron", "very old otter", "lynx", "newt", "stoat", "finch")
PLACES = ("barn", "pond", "attic", "cellar", "orchard")


def _multirc(n: int) -> dict[str, Any]:
    def question(q: int) -> dict[str, Any]:
        answers = [{"text": f"In the {PLACES[(n + q + a) % 5]} {a}", "label": (n + a) % 2, "idx": a} for a in range(3)]
        return {"question": f"Where did it sleep on day {q} ?", "answers": answers, "idx": q}

    text = f"Passage {n} . The {CREATURES[n % 7]} slept in many{' dark' * (n % 5)} places ."
    return {"idx": n, "version": 1.1, "passage": {"text": text, "questions": [question(q) for q in range(2)]}}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sst2": lambda n: {"sentence": f"tale {n} of a {CREATURES[n % 7]} in love . ", "label": n % 2, "idx": n},
    "rotten-tomatoes": lambda n: {"text": f"film {n} about a {CREATURES[n % 7]} .", "label": str(n % 2)},
    "rte": lambda n: {
        "premise": f"Report {n} says the {CREATURES[n % 7]} lives in a {PLACES[n % 5]}.",
        "hypothesis": f"The {CREATURES[n % 7]} has a home.",
        "label": ("entailment", "not_entailment")[n % 2],
        "idx": n,
    },
    "cb": lambda n: {
        "premise": f"Letter {n}. I think the {CREATURES[n % 7]} left.",
        "hypothesis": f"the {CREATURES[n % 7]} left",
        "label": ("entailment", "contradiction", "neutral")[n % 3],
        "idx": n,
    },
    "boolq": lambda n: {
        "question": f"does a {CREATURES[n % 7]} swim",
        "passage": f"Volume {n} -- A {CREATURES[n % 7]} swims in the {PLACES[n % 5]}.",
        "label": n % 2 == 0,
        "idx": n,
    },
    "wic": lambda n: {
        "word": "bank",
        "sentence1": f"Note {n}: the {CREATURES[n % 7]} sat on the bank.",
        "sentence2": "The bank was closed.",
        "label": n % 2 == 0,
        "idx": n,
        "start1": 9,
        "end1": 13,
        "start2": 4,
        "end2": 8,
        "version": 1.1,
    },
    "copa": lambda n: {
        "premise": f"Case {n}: the {CREATURES[n % 7]} ran.",
        "choice1": "A dog barked loudly.",
        "choice2": "It was late.",
        "question": ("cause", "effect")[n % 2],
        "label": n % 2,
        "idx": n,
    },
    "multirc": _multirc,
    "squad": lambda n: {
        "id": f"q{n}",
        "title": "Animals",
        "context": f"Chapter {n}. The {CREATURES[n % 7]} sleeps in the old {PLACES[n % 5]}.",
        "question": f"Where does the {CREATURES[n % 7]} sleep?",
        "answers": {"text": [f"the old {PLACES[n % 5]}", PLACES[n % 5]], "answer_start": [30, 38]},
    },
}


def write_task(folder: Path, name: str, train: int = 30, validation: int = 12, packed: bool = False) -> Path:
    """FOLDER/NAME/train.jsonl and validation.jsonl (.gz if packed); returns FOLDER."""
    place = folder / name
    place.mkdir(parents=True)
    for file, numbers in (("train", range(train)), ("validation", range(train, train + validation))):
        text = "".join(f"{json.dumps(ROWS[name](n))}\n" for n in numbers)
        if packed:
            (place / f"{file}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (place / f"{file}.jsonl").write_text(text, encoding="utf-8")
    return folder


def make_tokenizer(start: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows the words above and the label words; `start`: puts <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.dumps(ROWS[name](n)) for name in ROWS for n in range(35)]
    words = [" It was great terrible\nQuestion: Is that so? Yes or No?\nAnswer: Yes No Maybe"] * 100
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + words, trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_model(vocab_size: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers with random weights large enough for the answers to differ."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        **heads,
    )
    return LlamaForCausalLM(config).to(dtype).eval()
