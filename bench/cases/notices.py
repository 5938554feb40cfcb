"""What libraries tell developers is nothing for a reader of our tables: notices at import, and future warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# transformers imports torchao, which tells of kernels built for other GPUs and of an outdated way to register its
# types; bitsandbytes tells of a package with faster kernels for CPUs.
LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes")


@contextmanager
def without_notices() -> Iterator[None]:
    """For an import: inside, these libraries log errors only; afterwards they log as before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def ignore_future_warnings() -> None:
    """For the start of a worker process: libraries do not warn of what their next versions will refuse."""
    warnings.filterwarnings("ignore", category=FutureWarning)
