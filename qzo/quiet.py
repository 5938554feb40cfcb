"""Other libraries' notices and progress bars, kept off stderr while one of them is imported or called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# Their loggers; transformers and peft import torchao, of which torch then tells what is old-fashioned in it.
LIBRARIES = ("transformers", "peft", "accelerate", "bitsandbytes", "hqq", "aqlm", "torchao", "torch.utils._pytree")
JUST_BELOW_ERROR = logging.ERROR - 1  # a level that no library sets itself, so that ours is known again


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within, the libraries that models are made with log errors alone, and transformers shows no progress bars.

    Afterwards every logger has the level it had before. A level that a library sets itself when it is first imported
    stands, within and afterwards: import transformers first, which is silent, then call it in here. Warnings of this
    package, of the user's program and of Python's module `warnings` are not touched.
    """
    with ExitStack() as stack:
        stack.enter_context(_errors_alone())
        if "transformers" in sys.modules:
            stack.enter_context(_no_bars())
        yield


@contextmanager
def _errors_alone() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = {logger: logger.level for logger in loggers if logger.level < JUST_BELOW_ERROR}
    for logger in levels:
        logger.setLevel(JUST_BELOW_ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            if logger.level == JUST_BELOW_ERROR:
                logger.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """By the hook that transformers has for its bars; the one for GGUF files, which asks nobody, is made to ask it."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    gguf: Any = modeling_gguf_pytorch_utils
    hook, bar = transformers_logging.set_tqdm_hook(_hidden), gguf.tqdm
    gguf.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        gguf.tqdm = bar
        transformers_logging.set_tqdm_hook(hook)


def _hidden(bar: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A progress bar that counts and shows nothing."""
    return bar(*arguments, **{**named, "disable": True})
