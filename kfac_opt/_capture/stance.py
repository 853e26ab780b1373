"""Compiled models run eagerly while curvature is captured, so that hooks neither break nor re-trace their graphs.

``torch.compiler.set_stance`` is process-wide and its objects restore what they found, not a stack: with two
optimizers, A sets, B sets, A lifts, B lifts would leave the eager stance for ever. So one counter for all.
"""

from __future__ import annotations

from typing import Any

import torch

_holders: set[int] = set()
_stance: list[Any] = []


def hold_eager(holder: int) -> None:
    """Compiled code runs eagerly until every holder has let go. Holding twice counts once."""
    if not _holders:
        _stance.append(torch.compiler.set_stance("force_eager"))
    _holders.add(holder)


def release_eager(holder: int) -> None:
    """Ends this holder's wish; the last one restores the stance that was found."""
    if holder not in _holders:
        return
    _holders.discard(holder)
    if not _holders:
        _stance.pop().__exit__(None, None, None)
