"""Fixtures of the tests of studies: a folder of models to work in."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.studies import accuracy
from qzo.tasks.source.reviews import reviews

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A work folder with a tiny 16-bit model in the place of SmolLM2, and 16 forward passes in the place of 480."""
    words = sorted({word for text in reviews()[:300] for word in text.split()} | {"great", "terrible", "It", "was"})
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    folder = tmp_path / "models" / "16-bit"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words) + 1, **HEADS)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    monkeypatch.setattr(accuracy, "CALIBRATION", {"samples": 4, "seq_len": 16})
    monkeypatch.setattr(accuracy, "PASSES", 16)
    monkeypatch.setattr(accuracy, "FIRST_ORDER_STEPS", 3)
    return tmp_path
