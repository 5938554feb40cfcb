"""A parser whose errors are ours, told in one line."""

from __future__ import annotations

import argparse

from qzo.errors import QzoError


class Parser(argparse.ArgumentParser):
    """argparse that reports an error as one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise QzoError(f"{message} (see {self.prog} --help)")
