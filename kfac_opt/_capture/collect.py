"""Sums over whole passes through data, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from kfac_opt._capture.collector import Collector
from kfac_opt._capture.due import Tracked
from kfac_opt._capture.passes import Pending
from kfac_opt._curvature.block import State


def collect(
    collector: Collector,
    blocks: Mapping[str, Tracked],
    bases: Mapping[str, State | None],
    passes: Iterable[tuple[Callable[[], None], Tensor | None]],
) -> Pending:
    """What passes through a model add up to, in whatever mode it is. Hooks are on meanwhile alone.

    Args:
        blocks, bases: as in :meth:`Collector.attach`.
        passes: for each of them what runs the model, and the mask of its terms or None for all.
    """
    before, collector.any_mode = collector.any_mode, True
    collector.attach(blocks, bases)
    try:
        with torch.enable_grad():
            for run, mask in passes:
                with collector.with_mask(mask):
                    run()
        return collector.take()
    finally:
        collector.detach()
        collector.any_mode = before
