"""Regular expressions that a checkpoint brings along, matched in bounded time.

The module `re` has no limit: `([a-z]+)+!` takes years over a name of sixty letters. The module `regex`, on which
transformers stands, understands the same expressions and can be told when to give up.
"""

from __future__ import annotations

from typing import Any

import regex

from qzo.errors import QzoError

LONGEST = 1_000  # characters
SECONDS = 0.5  # for one name; a plausible expression takes a few microseconds


class Pattern:
    """An expression that a name must match from its start.

    Args:
        text: the expression, perhaps behind a prefix that says what it is for.
        prefixes: of which one may be in front.

    Raises QzoError for what is none.
    """

    def __init__(self, text: str, *prefixes: str) -> None:
        self.text = text
        expression = text[next((len(prefix) for prefix in prefixes if text.startswith(prefix)), 0) :]
        if len(text) > LONGEST:
            raise QzoError(f"an expression of {len(text):,} characters; no more than {LONGEST:,} are read; shorten it")
        try:
            self._compiled: Any = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise QzoError(f"{text!r} is no regular expression: {error}; mend it") from error

    def matches(self, name: str) -> bool:
        """Whether a name begins with what the expression describes. Raises QzoError where that takes too long."""
        try:
            return self._compiled.match(name, timeout=SECONDS) is not None
        except TimeoutError as error:
            raise QzoError(
                f"the expression {self.text!r} takes more than {SECONDS} s over the name {name}: its repeats nest, or "
                "are too many; write it without"
            ) from error
