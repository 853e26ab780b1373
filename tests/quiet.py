"""What the package itself says while a test runs, whatever filters are set: a right loop must see nothing but announcements."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ANNOUNCED = (
    "no layer adapter covers",
    "larger than max_factor_dim",
    "diagonal curvature is used there from now on",
    "taken for the logits",
)
"""Documented to be said once: which parameters have diagonal curvature, and which output the Fisher matrix belongs to."""


@contextmanager
def own_warnings() -> Iterator[list[str]]:
    """The messages that ``kfac_opt`` warns of inside, repetitions included; they are shown or not as ever."""
    said: list[str] = []
    warn = warnings.warn

    def listening(message: Any, category: Any = None, stacklevel: int = 1, *rest: Any, **options: Any) -> None:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("kfac_opt"):
            said.append(str(message))
        warn(message, category, stacklevel + 1, *rest, **options)

    warnings.warn = listening
    try:
        yield said
    finally:
        warnings.warn = warn


def beyond_announcements(said: Sequence[str], allowed: Sequence[str] = ()) -> list[str]:
    """Those of the messages that are no announcement, or were said twice."""
    return [
        message
        for number, message in enumerate(said)
        if message in said[:number] or not any(re.search(pattern, message) for pattern in (*ANNOUNCED, *allowed))
    ]
