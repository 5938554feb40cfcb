"""Other libraries' notices and progress bars, kept off stderr while one of them is imported or called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Their loggers; torchao is imported by transformers and peft, and torch tells what is old-fashioned in it.
LIBRARIES = ("transformers", "peft", "accelerate", "bitsandbytes", "hqq", "aqlm", "torchao", "torch.utils._pytree")
JUST_BELOW_ERROR = logging.ERROR - 1  # a level that no library sets itself, so that ours is known again


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within, the libraries that models are made with log errors alone, and transformers shows no progress bars.

    Afterwards every logger has the level it had before. A level that a library sets itself when it is first imported
    stands, within and afterwards: import transformers first, which is silent, then call it in here. Warnings of this
    package, of the user's program and of Python's module `warnings` are not touched.
    """
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = {logger: logger.level for logger in loggers if logger.level < logging.ERROR}
    transformers: Any = sys.modules.get("transformers.utils.logging")
    for logger in levels:
        logger.setLevel(JUST_BELOW_ERROR)
    hook = None if transformers is None else transformers.set_tqdm_hook(_hidden)
    try:
        yield
    finally:
        if transformers is not None:
            transformers.set_tqdm_hook(hook)
        for logger, level in levels.items():
            if logger.level == JUST_BELOW_ERROR:
                logger.setLevel(level)


def _hidden(bar: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A progress bar that counts and shows nothing."""
    return bar(*arguments, **{**named, "disable": True})
