"""Takes note of the calls of layers during a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kfac_opt._capture.calls import layer_tensors
from kfac_opt._capture.due import Due
from kfac_opt._capture.passes import Pass, Seen
from kfac_opt._capture.proving import Proving
from kfac_opt._capture.status import LayerStatuses
from kfac_opt._capture.sums import Sums
from kfac_opt._curvature.block import Call, CurvatureBlock
from kfac_opt._curvature.edges import output_edge
from kfac_opt.layers import has_own_forward


class Recorder:
    """Writes a layer's calls into the pass, or into its status why not.

    Args:
        on_call: is told of every call, with the edge in the graph that its output's gradient passes.
    """

    def __init__(
        self,
        due: Due,
        statuses: LayerStatuses,
        proving: Proving,
        sums: Sums,
        on_call: Callable[[Pass, str, GradientEdge], None],
    ) -> None:
        self.due, self.statuses, self.proving, self.sums, self.on_call = due, statuses, proving, sums, on_call

    def record(
        self,
        current: Pass,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        *,
        maskable: bool,
    ) -> None:
        """One call of a layer.

        Args:
            maskable: whether a mask may come with the outputs.
        """
        status = self.statuses[name]
        if status.foreign is not None:
            return
        if not torch.is_grad_enabled():
            status.hidden = True
            return
        tensors = layer_tensors(args, kwargs, out)
        if tensors is None or not out.requires_grad:
            return
        x = tensors[0]
        if _irregular(x) or _irregular(out):
            self.proving.refuse(current, name, "tensors")
            return
        block = self.due.entries[name].block
        if out.numel() == 0 or x.numel() == 0:
            status.ran = True
            return  # no rows
        positions = _positions(block, out)
        if positions is None:
            return
        status.ran = True
        call = self._keep(current, name, module, x, out, positions)
        if not maskable and block.sharing == "expand" and name not in current.held:
            # No mask can come and each row counts by itself: take the moment now, so that checkpointing can free the input.
            self.sums.take_input(current, name, call)

    def _keep(self, current: Pass, name: str, module: nn.Module, x: Tensor, out: Tensor, positions: tuple[int, int]) -> Call:
        edge, view = output_edge(out, x)
        call = Call(x.detach(), positions, view)
        current.calls.setdefault(name, []).append(call)
        current.edges.setdefault(name, []).append(edge)
        self.on_call(current, name, edge)
        if self.statuses[name].proof != "proven" and self.proving.possible(name):
            current.inputs.setdefault(name, []).append(Seen.of(x))
            if has_own_forward(module):
                current.held.add(name)
        return call


def _positions(block: CurvatureBlock, out: Tensor) -> tuple[int, int] | None:
    """``(batch, shared)`` of a call; None where a subclass returns something else than its linear map: as if it had not run."""
    assert block.adapter is not None
    groups, batch, shared, out_dim = block.adapter.output_rows(out.detach()).shape
    return (batch, shared) if (groups, out_dim) == block.layout.shape[:2] else None


def _irregular(tensor: Tensor) -> bool:
    """Nested and sparse tensors have no rows to speak of."""
    return tensor.is_nested or tensor.layout != torch.strided
