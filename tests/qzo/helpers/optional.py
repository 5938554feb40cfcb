"""Packages that the product works without: `from optional import gguf` is the package, or skips a test that uses it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest


class Missing:
    """In the place of a package that is not installed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # of pytest, which looks at every name of a module
            raise AttributeError(attribute)
        return pytest.importorskip(self._name)  # skips the test at hand, or the file that is read


gguf: Any = Missing("gguf") if find_spec("gguf") is None else import_module("gguf")
