"""The reward of the study on rewards: whether an answer begins with Yes or No. It knows no right answers."""

from __future__ import annotations

import re
from typing import Any


def yes_or_no(completions: list[Any], **columns: Any) -> list[float]:
    """1 for an answer whose first word is Yes or No, 0 for any other; called as TRL's GRPOTrainer calls rewards."""
    return [float(bool(re.match(r"(Yes|No)\b", completion[0]["content"]))) for completion in completions]
