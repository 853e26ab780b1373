"""Progress with remaining time: a live bar on a terminal, one line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Counts finished units of work; ``note`` is shown behind the bar."""

    def __init__(self, bar: tqdm[None]) -> None:
        self._bar = bar

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Counts ``amount`` units as done."""
        if note is not None:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._bar.write(message, file=sys.stderr)


@contextmanager
def progress(total: int, description: str, *, done: int = 0) -> Iterator[Progress]:
    """A progress display over ``total`` units of which ``done`` were finished in an earlier run."""
    interval = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(
        total=total, initial=done, desc=description, mininterval=interval, dynamic_ncols=True, file=sys.stderr
    ) as bar:
        yield Progress(bar)


def duration(seconds: float) -> str:
    """``93.2`` as ``1 min 33 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """``with stopwatch() as elapsed: ...``; afterwards ``elapsed[0]`` is the time in seconds."""
    elapsed: list[float] = []
    start = time.perf_counter()
    try:
        yield elapsed
    finally:
        elapsed.append(time.perf_counter() - start)
