"""Text that a model learns to write: a prompt with one answer, or with a better and a worse one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError
from qzo.tasks.source.row import Row, shown

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `more` holds what a template may want beside, as JSON."""

    role: str
    content: str
    more: str = "{}"

    def fields(self) -> dict[str, Any]:
        """As a chat template takes it."""
        return {"role": self.role, "content": self.content, **json.loads(self.more)}


Text = str | tuple[Message, ...]


@dataclass(frozen=True)
class Sequence:
    """A prompt, "" or () for none, and the answers to it: one, or the better one and the worse one.

    Attributes:
        where: of its row, for errors.
        prompt: text or messages; never learnt.
        answers: of the same kind; of messages, the assistant's turns are learnt.
    """

    where: str
    prompt: Text
    answers: tuple[Text, ...]
    label = 0
    group = ""

    def key(self) -> str:
        """The letters and digits in lower case: what differs in nothing else counts as the same."""
        parts = (self.prompt, *self.answers) if len(self.answers) == 1 else (self.prompt,)
        text = "".join(part if isinstance(part, str) else "".join(m.content for m in part) for part in parts)
        return "".join(letter for letter in text.lower() if letter.isalnum()) or self.where


def text_row(row: Row) -> Sequence:
    """Of a row with text. Raises QzoError."""
    return Sequence(row.where, "", (_string(row, "text"),))


def completion_row(row: Row) -> Sequence:
    """Of a row with prompt and completion, both text or both messages. Raises QzoError."""
    prompt = text_or_messages(row, "prompt")
    return Sequence(row.where, prompt, (_answer(row, "completion", isinstance(prompt, str)),))


def chat_row(row: Row) -> Sequence:
    """Of a row with messages. Raises QzoError where no turn is the assistant's."""
    return Sequence(row.where, (), (_spoken(row, "messages"),))


def preference_row(row: Row) -> Sequence:
    """Of a row with chosen and rejected; without a prompt, what both begin with is the prompt. Raises QzoError."""
    prompt: Text
    pair: list[Text]
    if "prompt" in row.fields:
        prompt = text_or_messages(row, "prompt")
        pair = [_answer(row, name, isinstance(prompt, str)) for name in ("chosen", "rejected")]
    else:
        both = [text_or_messages(row, name) for name in ("chosen", "rejected")]
        if isinstance(both[0], str) is not isinstance(both[1], str):
            raise QzoError(
                f'{row.where}: of "chosen" and "rejected", one is text and one is messages; write both alike'
            )
        count = _common(both[0], both[1])
        prompt, pair = both[0][:count], [text[count:] for text in both]
    if pair[0] == pair[1]:
        raise QzoError(f'{row.where}: "chosen" and "rejected" are the same; remove the row')
    for name, answer in zip(("chosen", "rejected"), pair, strict=True):
        if not answer:
            raise QzoError(
                f'{row.where}: nothing of "{name}" is left behind what both begin with; make the answers differ from '
                'their first word on, or give "prompt"'
            )
    return Sequence(row.where, prompt, (pair[0], pair[1]))


def _common(one: Text, other: Text) -> int:
    """How many messages, or characters of whole words, two texts have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    count = next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    if isinstance(one, str):
        count = max(one.rfind(" ", 0, count), one.rfind("\n", 0, count), 0)  # an answer begins with its white space
    return count


def text_or_messages(row: Row, name: str) -> Text:
    """A field of text, which may be empty, or of messages. Raises QzoError."""
    return _messages(row, name) if isinstance(row.fields.get(name), list) else _string(row, name, may_be_empty=True)


def _answer(row: Row, name: str, text: bool) -> Text:
    if text is not isinstance(row.get(name, (str, list)), str):
        raise QzoError(f'{row.where}: "prompt" and "{name}" must both be text, or both lists of messages')
    return _string(row, name) if text else _spoken(row, name)


def _spoken(row: Row, name: str) -> tuple[Message, ...]:
    found = _messages(row, name)
    if not any(message.role == "assistant" and message.content.strip() for message in found):
        raise QzoError(
            f'{row.where}: "{name}" has no turn of the role "assistant", so there is nothing to learn; add one, or '
            "remove the row"
        )
    return found


def _string(row: Row, name: str, may_be_empty: bool = False) -> str:
    text: str = row.get(name)
    if not (text.strip() or may_be_empty):
        raise QzoError(f'{row.where}: "{name}" is empty; fill it, or remove the row')
    return text


def _messages(row: Row, name: str) -> tuple[Message, ...]:
    turns = row.get(name, list)
    if not turns:
        raise QzoError(f'{row.where}: "{name}" is empty; fill it, or remove the row')
    return tuple(_message(row.inner(turn, f"{name} {number}")) for number, turn in enumerate(turns, 1))


def _message(turn: Row) -> Message:
    role = turn.get("role")
    if role not in ROLES:
        raise QzoError(f"{turn.where}: the role {shown(role)} is not known; it must be one of {', '.join(ROLES)}")
    more = {name: value for name, value in turn.fields.items() if name not in ("role", "content") and value is not None}
    content = turn.fields.get("content")
    if content is None and "tool_calls" in more:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(turn, part) for part in content)
    if not isinstance(content, str):
        raise QzoError(f'{turn.where}: "content" is {shown(content)}; it must be text')
    return Message(role, content, json.dumps(more, default=str))


def _part(turn: Row, part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise QzoError(
        f"{turn.where}: a part of the content is {shown(part)}; only text is trained here: remove it, or the row"
    )
