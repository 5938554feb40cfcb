"""What libraries tell developers of their next versions is nothing for a reader of our tables."""

from __future__ import annotations

import warnings


def ignore_future_warnings() -> None:
    """For the start of a worker process: libraries do not warn of what their next versions will refuse."""
    warnings.filterwarnings("ignore", category=FutureWarning)
