"""The empirical Fisher: output gradients are those of the user's own backward, as they arrive."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_opt._capture.distributed import num_ranks
from kfac_opt._capture.due import Due, Estimate
from kfac_opt._capture.finite import all_finite
from kfac_opt._capture.passes import Arrival, LogitsArrival, Pass, Pending, Tally, on_gradient
from kfac_opt._capture.proof import Evidence
from kfac_opt._capture.proving import Proving
from kfac_opt._capture.replays import hand_to_parts
from kfac_opt._capture.status import LayerStatuses
from kfac_opt._capture.sums import Sums
from kfac_opt._capture.taps import Taps
from kfac_opt._curvature.block import Statistics
from kfac_opt._curvature.precision import full_precision


class UserGradients:
    """A source whose passes stay open until their backward has come; their scale is that of the whole step.

    See :class:`kfac_opt._capture.source.GradientSource`.
    """

    def __init__(self, estimate: Estimate, due: Due, statuses: LayerStatuses, proving: Proving, sums: Sums, tally: Tally) -> None:
        self.estimate, self.due, self.statuses = estimate, due, statuses
        self.proving, self.sums, self.tally = proving, sums, tally

    def on_call(self, current: Pass, name: str, edge: GradientEdge) -> None:
        """Waits for the gradient of this call."""
        current.gradients.setdefault(name, []).append(None)
        on_gradient(edge, Arrival(current, name, len(current.gradients[name]) - 1))

    def collect(self, current: Pass, logits: Tensor, mask: Tensor | None, pending: Pending) -> None:
        """Waits for the gradient of the outputs."""
        current.logits = logits.detach()
        to_prove = self.proving.own_parameters(current)
        if to_prove and logits.grad_fn is not None:
            nodes = [edge.node for edges in current.edges.values() for edge in edges]
            current.taps = Taps([logits.grad_fn, *nodes], to_prove, self)
        current.edges = {}  # they would keep the graph of a pass without a backward
        on_gradient(get_gradient_edge(logits), LogitsArrival(current))
        pending.open.append(current)

    def end_step(self) -> None:
        """A layer whose gradient alone is there: a diagonal block can have it."""
        for name in self.statuses.unseen:
            gradient = self.due.entries[name].weight.grad if name in self.due.entries else None
            if gradient is not None and bool(gradient.any()):
                self.statuses[name].foreign = "hidden"

    def start_step(self) -> None:
        """Passes that are open go with the sums."""

    def settle(self, pending: Pending) -> None:
        """Turns passes whose backward arrived into sums."""
        waiting: list[Pass] = []
        for current in pending.open:
            if current.logits_gradient is None:
                waiting.append(current)
                continue
            assert current.logits is not None
            with torch.no_grad(), full_precision(current.logits.device):
                if self._take(current):
                    current.scale = self.estimate.likelihood.gradient_scale(current.logits, current.logits_gradient)
                    pending.settled.append(current)
            current.logits = current.logits_gradient = None
            current.gradients, current.calls, current.replays = {}, {}, {}
        pending.open = waiting

    def _take(self, current: Pass) -> bool:
        """The gradients of a pass into sums; whether they are finite."""
        hand_to_parts(current, current.gradients)
        self._prove(current)
        for name, gradients in current.gradients.items():
            if name in self.due.entries:
                self.sums.add_output(current, name, gradients)
        if current.masked:
            self.sums.take_inputs(current)
        finite = all_finite(current.statistics.values())
        if not finite:
            self.tally.drop()
        return finite

    def _prove(self, current: Pass) -> None:
        """Holds what this pass gave to the gradients of the weights against what the hooks saw."""
        taps, current.taps = current.taps, None
        evidence: dict[str, Evidence] = {}
        if taps is not None:
            for name in taps.found:
                if name in current.gradients and name in self.due.entries:
                    self.proving.note(evidence, current, name, current.gradients[name])
        self.proving.judge(current, evidence, {} if taps is None else taps.found)

    @torch.no_grad()
    def complete(self, pending: Pending, sample_ranks: int) -> None:
        """``g = N_step · s · ∂/∂output``: undoes the reduction of the loss, and its scale where that can be read off."""
        terms = sum(current.num_terms for current in pending.settled)
        pending.num_terms += terms  # passes that were steps of their own are in it already
        reduced = float(terms) if self.estimate.loss_reduction == "mean" else 1.0
        for current in pending.settled:
            scale = reduced if current.scale is None else 1.0 / current.scale
            for name, statistics in current.statistics.items():
                if name in self.due.entries:
                    self.due.entries[name].block.scale_outputs(statistics, scale)
            pending.keep(current)
        if pending.settled:
            self._add_parameters(pending, reduced, sample_ranks)
        pending.settled = []

    def _add_parameters(self, pending: Pending, scale: float, sample_ranks: int) -> None:
        """Parameters of their own: the squared gradient of the sum over all examples.

        Biased, since labels of the data have no mean zero. Every rank holds the gradient of the batch of all ranks: R
        shares of (√R N_rank)² add up to N². Ranks that run other passes of the same batch do not share it.
        """
        scale *= (num_ranks(self.estimate.process_group) / sample_ranks) ** 0.5
        alone = [entry for entry in self.due.entries.values() if entry.module is None and entry.weight.grad is not None]
        gradients = [cast(Tensor, entry.weight.grad) * scale for entry in alone]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.tally.dropped += 1
            return
        for entry, gradient in zip(alone, gradients):
            entry.block.add_output(pending.statistics.setdefault(entry.name, Statistics()), [], [gradient], None)
