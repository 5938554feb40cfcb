"""A parser whose errors are ours, told in one line."""

from __future__ import annotations

import argparse

from qzo.errors import QzoError

RECIPE = "configuration of TRL, the Trainer, axolotl or LLaMA-Factory"


class Parser(argparse.ArgumentParser):
    """argparse that reports an error as one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise QzoError(f"{message} (see {self.prog} --help)")


def add_options(parser: argparse.ArgumentParser, recipe: str = RECIPE) -> None:
    """The three options, for `run`, `fit` and `validate`; `recipe` is the help of the last."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="option of the Trainer, PEFT or bitsandbytes, as often as needed: r=16, optim=adamw_bnb_8bit, ...",
    )  # fmt: skip
    parser.add_argument("--peft-config", metavar="FILE", help="adapter_config.json of any PEFT method, not LoRA")
    parser.add_argument("--recipe", metavar="FILE", help=recipe)
