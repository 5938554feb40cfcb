"""Long texts in pieces, so that a single book can be split into training, validation and test."""

from __future__ import annotations

from qzo.tasks.own.sequence import Sequence

PIECE = 4000  # characters, about a thousand tokens


def pieces(text: Sequence) -> list[Sequence]:
    """The text, a long one cut at ends of paragraphs or lines into pieces of about 4,000 characters."""
    return [Sequence(text.where, "", (piece,)) for answer in text.answers for piece in _cut(str(answer))]


def _cut(text: str) -> list[str]:
    found, start = [], 0
    while len(text) - start > 2 * PIECE:
        ends = (text.rfind(mark, start + PIECE // 2, start + PIECE) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > 0), start + PIECE - 1) + 1
        found.append(text[start:end])
        start = end
    found.append(text[start:])
    return [piece for piece in found if piece.strip()]
