"""The keys of a configuration file, taken one by one: of the right type, in bounds, and none forgotten."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qzo.errors import QzoError

LARGEST = 1 << 24  # of a count: a batch, a length, a rank
DTYPES = ("bfloat16", "float16", "float32")


class Stated:
    """What a file states. A key without a value (`null`, or nothing after the colon) is one that is not stated, as in
    all three tools. What no method was asked for is in `rest()`.

    Args:
        values: of the file.
        path: named in messages.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.path = path
        self._values = {key: value for key, value in values.items() if value is not None}
        self._taken: set[str] = set()
        self.not_honoured: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def wrong(self, key: str, rule: str) -> QzoError:
        """The error of a value that breaks a rule, to be raised."""
        shown = repr(self._values.get(key))
        return QzoError(f"{self.path}: {key}={shown if len(shown) <= 60 else shown[:57] + '...'} {rule}")

    def value(self, key: str) -> Any:
        """Whatever stands there, or None; the key counts as understood."""
        self._taken.add(key)
        return self._values.get(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch; "true" in quotes is one too, since command lines know no other."""
        value = self.value(key)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "is no switch; write true or false")
        return default if value is None else value

    def count(self, key: str, default: int, least: int = 1) -> int:
        """A whole number from `least` to 2^24."""
        value = self.value(key)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9:
            value = int(value)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self.wrong(key, f"is no whole number from {least} to {LARGEST:,}; write one")
        return value

    def number(self, key: str, default: float) -> float:
        """A number; 1e-4, which YAML 1.1 takes for a text, is one."""
        value = self.value(key)
        if value is None:
            return default
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            return float(value)
        except (ValueError, OverflowError):
            raise self.wrong(key, "is no number; write one") from None

    def text(self, key: str, default: str | None = None, choices: Iterable[str] = ()) -> str | None:
        """A text, one of `choices` where there are some."""
        value = self.value(key)
        if value is None:
            return default
        allowed = tuple(choices)
        if not isinstance(value, str) or (allowed and value not in allowed):
            near = difflib.get_close_matches(str(value), allowed, n=1)
            raise self.wrong(key, f"is unknown; choose {near[0] if near else ', '.join(allowed)}" if allowed
                             else "is no text; write one")  # fmt: skip
        return value

    def names(self, key: str) -> list[str] | str | None:
        """Names of modules: a list, or a text, in which commas part names."""
        value = self.value(key)
        if isinstance(value, str):
            return [name.strip() for name in value.split(",")] if "," in value else value
        if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise self.wrong(key, "is no list of names; write [a, b]")
        return value or None

    def mapping(self, key: str) -> dict[str, Any] | None:
        """Keys and values of their own."""
        value = self.value(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "has no keys of its own; write key: value, indented, below it")
        return value

    def silent(self, *keys: str) -> None:
        """Keys that do not concern memory, several in a text; a star at the end stands for any ending."""
        for key in " ".join(keys).split():
            self._taken.update(fnmatch.filter(self._values, key) if key.endswith("*") else (key,))

    def tell(self, reasons: Mapping[str, str]) -> None:
        """Keys that concern memory and are not simulated: told where they are switched on."""
        for key, reason in reasons.items():
            value = self.value(key)
            if value not in (None, False, "", 0, [], {}, "false"):
                self.not_honoured.append(f"{key}: {reason}")

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Keys that make another kind of training of it. Raises QzoError where one is switched on."""
        for key, reason in reasons.items():
            if self.value(key) not in (None, False, "", "false"):
                raise self.wrong(key, f"{reason}; leave it out")

    def rest(self) -> tuple[str, ...]:
        """The keys that nobody asked for."""
        return tuple(key for key in self._values if key not in self._taken)
