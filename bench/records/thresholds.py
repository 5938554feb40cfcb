"""How much growth `bench compare` allows: METRIC:LIMIT, parsed and shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from bench.ledger.sizes import parse_bytes
from bench.records.record import ROLES
from qzo.errors import QzoError

METRICS = ("allocated", "reserved", "process", "floor", "step_seconds", *ROLES)
PHASE = "phase:"


@dataclass(frozen=True)
class Threshold:
    """How much a metric may grow: `limit` percent of the baseline, or `limit` bytes (seconds for `step_seconds`)."""

    metric: str
    limit: Fraction
    relative: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS and not (self.metric.startswith(PHASE) and self.metric != PHASE):
            raise QzoError(f"unknown metric {self.metric!r}; choose one of {', '.join(METRICS)} or {PHASE}NAME")

    @classmethod
    def parse(cls, spec: str) -> Threshold:
        """The threshold in METRIC:5%, METRIC:100MiB or step_seconds:0.2s.

        Raises:
            QzoError: unknown metric, or no such limit.
        """
        metric, colon, limit = spec.strip().rpartition(":")
        if not colon:
            raise QzoError(f"--fail {spec}: no limit; write METRIC:5% or METRIC:100MiB")
        cls(metric, Fraction(0))  # an unknown metric is told before a wrong limit
        number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|s)", limit)
        if number and (number[2] == "%" or metric == "step_seconds"):
            return cls(metric, Fraction(number[1]), relative=number[2] == "%")
        absolute = "0.2s" if metric == "step_seconds" else "100MiB"
        try:
            if metric == "step_seconds":
                raise QzoError(f"{limit!r} is not a time")
            return cls(metric, Fraction(parse_bytes(limit)), relative=False)
        except QzoError as error:
            raise QzoError(
                f"--fail {spec}: {limit!r} is not a limit; write {metric}:5% or {metric}:{absolute}"
            ) from error

    def exceeded(self, baseline: Any, current: Any) -> bool:
        """Whether the growth is over the limit; exactly at the limit it is not. From 0, any percentage is over."""
        allowed = _exact(baseline) * self.limit / 100 if self.relative else self.limit
        return _exact(current) - _exact(baseline) > allowed

    def __str__(self) -> str:
        number = f"{float(self.limit):g}"
        if self.relative:
            return f"{self.metric}:{number}%"
        return f"{self.metric}:{number}s" if self.metric == "step_seconds" else f"{self.metric}:{int(self.limit)}B"


DEFAULT_FAIL = (Threshold("allocated", Fraction(1)),)


def _exact(value: float) -> Fraction:
    """The number as it is written in the record, so that exactly 5 % more is not more than 5 %."""
    return Fraction(str(value))
