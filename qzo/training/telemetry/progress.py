"""What a training run shows while it runs: a bar or lines on stderr, and numbers to writers."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from qzo.errors import printable
from qzo.training.learners import Outcome
from qzo.training.telemetry.writers import Writer

WINDOW = 100  # steps that the share of clipped ones is taken over
NARROW = 60  # columns below which there is room for numbers alone
SILENCE = 30.0  # seconds after which a line tells how far the run is, where there is no terminal


def tell(text: str) -> None:
    """Say on stderr what begins now, or what a user must know."""
    print(printable(text), file=sys.stderr, flush=True)


def lines_of(what: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """A function of (examples done, all of them) that tells every half minute how far `what` is."""
    last = clock()

    def watch(done: int, count: int) -> None:
        nonlocal last
        if clock() - last >= SILENCE and done < count:
            last = clock()
            tell(f"{what}: {done:,} of {count:,} examples")

    return watch


class Progress:
    """On a terminal a bar: steps, time left, loss, d, share of clipped steps. Elsewhere a line every half minute.

    Each validation is one line, on a terminal above the bar, and tells how far it is meanwhile. `writers` get the
    numbers too. `clock` gives seconds.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        slope_name: str = "d",
        writers: Sequence[Writer] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.start, self.slope_name, self._clock = steps, start, slope_name, clock
        self._begun = self._last_line = clock()
        self._clipped: deque[bool] = deque(maxlen=WINDOW)
        self._writers = writers
        self._bar: Any = _bar(steps, start) if sys.stderr.isatty() else None

    @property
    def clipped_share(self) -> float:
        """Share of the last 100 steps whose d was clipped."""
        return sum(self._clipped) / max(1, len(self._clipped))

    def step(self, steps: int, outcome: Outcome, lr: float) -> None:
        """Show a step; `steps` counts it."""
        self._clipped.append(outcome.clipped)
        scalars = {"loss": outcome.loss, self.slope_name: outcome.slope, "lr": lr, "clipped": self.clipped_share}
        self._scalars("train", scalars, steps)
        slope = f"{self.slope_name} {outcome.slope:.3g}"
        text = f"train loss {outcome.loss:.4f}  {slope}  clipped {self.clipped_share:.0%}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=steps, text=text)
        elif self._is_due():
            self._line(f"step {steps} of {self.steps}  {text}  {self._times(steps)}")

    def validating(self, done: int, count: int) -> None:
        """Show how many examples of a validation are done."""
        text = f"validation: {done:,} of {count:,} examples"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], text=text)
        elif self._is_due() and done < count:
            self._line(f"{text}  {_shown(self._clock() - self._begun)} spent")

    def validation(self, steps: int, result: dict[str, Any], better: bool) -> None:
        """Show the result of a validation."""
        numbers = {name: value for name, value in result.items() if name != "count"}
        self._scalars("validation", numbers, steps)
        text = "  ".join(
            f"validation {name} {value:.4f}" for name, value in numbers.items() if isinstance(value, float)
        )
        self._line(f"step {steps}  {text}{'  best' if better else ''}")

    def phase(self, text: str) -> None:
        """Tell what begins now and is no step."""
        self._line(text)

    def notice(self, text: str) -> None:
        """Tell what happened on a resume."""
        self._line(f"notice: {text}")

    def _is_due(self) -> bool:
        return self._clock() - self._last_line >= SILENCE

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        if self._bar is None:
            tell(text)
        else:
            self._bar.console.print(printable(text), highlight=False, markup=False)

    def _times(self, steps: int) -> str:
        """Time spent, and what the steps to come will take if they take as long."""
        spent = self._clock() - self._begun
        left = spent / max(1, steps - self.start) * (self.steps - steps)
        return f"{_shown(spent)} spent, {_shown(left)} left"

    def _scalars(self, group: str, values: dict[str, Any], steps: int) -> None:
        numbers = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, float)}
        for writer in self._writers:
            writer.scalars(numbers, steps)

    def close(self) -> None:
        """Take the bar down, and have the writers write what they have not."""
        if self._bar is not None:
            self._bar.stop()
        for writer in self._writers:
            writer.close()


def _shown(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _bar(steps: int, start: int) -> Any:
    """Count and time left in front, and one line however narrow the terminal: what does not fit is cut at its end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(stderr=True)
    words = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    drawn = (BarColumn(bar_width=10),) if console.width >= NARROW else ()
    bar = Bar(MofNCompleteColumn(), *drawn, TimeRemainingColumn(), words, console=console, expand=True)
    bar.add_task("train", total=steps, completed=start, text="")
    bar.start()
    return bar
