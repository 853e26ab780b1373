"""A loop over passes that ends when it is left, whoever still holds the iterator."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Generator, Iterator

Numbers = Generator[int, None, None]


class Suspended(Iterator[int]):
    """What ``weight_samples()`` returns: the numbers of a generator that holds the weights at a draw while it is suspended.

    A ``for`` loop gets an iterator of its own, which only the loop holds: left by an exception or ``break``, it goes and
    closes the generator, also where this object is bound to a variable that a traceback keeps alive. Stepped by hand
    (``next``), it lasts until ``close()``, until nobody holds it, or until the program ends.
    """

    def __init__(self, passes: Numbers) -> None:
        self._passes = passes
        _open.add(passes)

    def __iter__(self) -> Iterator[int]:
        return _Loop(self._passes)

    def __next__(self) -> int:
        return next(self._passes)

    def close(self) -> None:
        """Leaves the loop: the weights are the means again."""
        self._passes.close()


class _Loop(Iterator[int]):
    def __init__(self, passes: Numbers) -> None:
        self._passes = passes

    def __next__(self) -> int:
        return next(self._passes)

    def __del__(self) -> None:
        self._passes.close()


_open: weakref.WeakSet[Numbers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """While torch is whole: a generator that the interpreter closes on its way out calls into what is gone."""
    for passes in list(_open):
        passes.close()
