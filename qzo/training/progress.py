"""What a training run shows while it runs: a bar on stderr, and TensorBoard scalars where that is installed."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import Any

from qzo.errors import printable
from qzo.training.learners import Outcome

WINDOW = 100  # steps that the share of clipped ones is taken over


class Progress:
    """A bar with step, loss, d, share of clipped steps, validation and time left; on a terminal only.

    Elsewhere each validation is one line on stderr. `folder` gets TensorBoard's files; None, no such files.
    """

    def __init__(self, steps: int, start: int = 0, slope_name: str = "d", folder: Path | None = None) -> None:
        self.slope_name = slope_name
        self._clipped: deque[bool] = deque(maxlen=WINDOW)
        self._validation = ""
        self._writer: Any = None if folder is None else _summary_writer(folder, start)
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
        if self._bar is not None:
            text = f"loss {outcome.loss:.4f}  {self.slope_name} {outcome.slope:.3g}  clipped {self.clipped_share:.0%}"
            self._bar.update(self._bar.task_ids[0], completed=steps, text=f"{text}{self._validation}")

    def validation(self, steps: int, result: dict[str, Any], better: bool) -> None:
        """Show a validation."""
        numbers = {name: value for name, value in result.items() if name != "count"}
        self._scalars("validation", numbers, steps)
        text = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if isinstance(value, float))
        self._validation = f"  {text}"
        if self._bar is None:
            print(f"step {steps}  {text}{'  best' if better else ''}", file=sys.stderr)

    def notice(self, text: str) -> None:
        """Tell what happened on a resume."""
        print(f"notice: {printable(text)}", file=sys.stderr)

    def _scalars(self, group: str, values: dict[str, Any], steps: int) -> None:
        for name, value in values.items() if self._writer is not None else ():
            if isinstance(value, float):
                self._writer.add_scalar(f"{group}/{name}", value, steps)

    def close(self) -> None:
        """Take the bar down and write what TensorBoard has not."""
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()


def _bar(steps: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task("train", total=steps, completed=start, text="")
    bar.start()
    return bar


def _summary_writer(folder: Path, start: int) -> Any:
    """TensorBoard's writer, None where TensorBoard is not installed; scalars after `start` are of a life before."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
