"""Progress with remaining time: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_INTERVAL_SECONDS = 20.0


class Progress:
    """Counts finished units of work of ``total``; what an earlier run has done does not enter the time estimate."""

    def __init__(self, total: int, description: str, done: int) -> None:
        self.total, self.description, self.done = total, description, done
        self._first, self._start, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(description, total=total, completed=done, note="")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Counts ``amount`` units as done; ``note`` says which."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=note)
        elif time.monotonic() - self._last_line > LOG_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{self.description}: {self.done}/{self.total}, {duration(self.remaining)} left ({note})")

    @property
    def remaining(self) -> float:
        """Seconds that are left if the rest goes as the work so far."""
        elapsed = time.monotonic() - self._start
        return elapsed / max(1, self.done - self._first) * (self.total - self.done)

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(message)
        else:
            print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, description: str, *, done: int = 0) -> Iterator[Progress]:
    """A progress display over ``total`` units of which ``done`` were finished in an earlier run."""
    display = Progress(total, description, done)
    if display._bar is None:
        yield display
    else:
        with display._bar:
            yield display


def duration(seconds: float) -> str:
    """``93.2`` as ``1 min 33 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
