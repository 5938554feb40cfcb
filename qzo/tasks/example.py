"""One labelled example, as every task hands it on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt, the answers it may get and the right one.

    The prompt is `text + ask`; each answer continues it and starts with the white space that parts them.

    Attributes:
        text: the part that may be cut on the left where the prompt is too long, and that no two splits share.
        ask: what comes after it and is never cut: the question, or the start of the sentence that the answer ends.
        answers: the candidates; in a generation task, the answers that people gave.
        label: index of the right candidate; 0 in a generation task, which is trained on the first answer.
        group: examples with the same group, if not "", are answers to one question, judged together and never parted.
    """

    text: str
    ask: str
    answers: tuple[str, ...]
    label: int
    group: str = ""

    def key(self) -> str:
        """The letters and digits of the text in lower case: texts that differ in nothing else count as the same."""
        return "".join(letter for letter in self.text.lower() if letter.isalnum()) or self.text
