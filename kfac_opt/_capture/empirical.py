"""The empirical Fisher: output gradients are those of the user's own backward, as they arrive."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_opt._capture.collector import Collector, FisherKind
from kfac_opt._capture.distributed import num_ranks
from kfac_opt._capture.passes import Arrival, LogitsArrival, Pass, Pending, on_gradient
from kfac_opt._capture.proof import Evidence
from kfac_opt._capture.taps import Taps
from kfac_opt._curvature.block import Statistics
from kfac_opt._curvature.precision import full_precision
from kfac_opt.likelihoods import Likelihood


class EmpiricalCollector(Collector):
    """Passes stay open until their backward has come; their scale is that of the whole step."""

    def _on_call(self, current: Pass, name: str, edge: GradientEdge) -> None:
        current.gradients.setdefault(name, []).append(None)
        on_gradient(edge, Arrival(current, name, len(current.gradients[name]) - 1))

    def _collect(self, current: Pass, logits: Tensor, mask: Tensor | None) -> None:
        current.logits = logits.detach()
        proving = {name: self._own_parameters(name) for name in self._to_prove(current)}
        if proving and logits.grad_fn is not None:
            nodes = [edge.node for edges in current.edges.values() for edge in edges]
            current.taps = Taps([logits.grad_fn, *nodes], proving, self)
        current.edges = {}  # they would keep the graph of a pass without a backward
        on_gradient(get_gradient_edge(logits), LogitsArrival(current))
        self.pending.open.append(current)

    def take(self, *, gradients_came: bool = False) -> Pending:
        for name in self.hidden - self.fired:
            gradient = self._due[name].weight.grad if name in self._due else None
            if gradient is not None and bool(gradient.any()):
                self.foreign[name] = "hidden"  # its gradient alone is there: a diagonal block can have it
        return super().take(gradients_came=gradients_came)

    def _settle(self) -> None:
        """Turns passes whose backward arrived into sums."""
        waiting: list[Pass] = []
        for current in self.pending.open:
            if current.logits_gradient is None:
                waiting.append(current)
                continue
            assert current.logits is not None
            with torch.no_grad(), full_precision(current.logits.device):
                self._prove(current)
                for name, gradients in current.gradients.items():
                    if name in self._due:
                        self._add_output(current, name, gradients)
                if current.masked:
                    self._take_inputs(current)
                if self._finite(current):
                    current.scale = self.likelihood.gradient_scale(current.logits, current.logits_gradient)
                    self.pending.settled.append(current)
            current.logits = current.logits_gradient = None
            current.gradients, current.calls = {}, {}
        self.pending.open = waiting

    def _prove(self, current: Pass) -> None:
        """Holds what this pass gave to the gradients of the weights against what the hooks saw."""
        taps, current.taps = current.taps, None
        evidence: dict[str, Evidence] = {}
        if taps is not None:
            for name in taps.found:
                if name in current.gradients and name in self._due:
                    self._note(evidence, current, name, current.gradients[name])
        self._judge(current, evidence, {} if taps is None else taps.found)
        current.inputs.clear()

    @torch.no_grad()
    def _complete(self, pending: Pending) -> None:
        """``g = N_step · s · ∂/∂output``: undoes the reduction of the loss, and its scale where that can be read off."""
        terms = sum(current.num_terms for current in pending.settled)
        pending.num_terms += terms  # passes that were steps of their own are in it already
        for current in pending.settled:
            reduced = float(terms) if self.loss_reduction == "mean" else 1.0
            scale = reduced if current.scale is None else 1.0 / current.scale
            for name, statistics in current.statistics.items():
                if name in self._due:
                    self._due[name].block.scale_outputs(statistics, scale)
            self._keep(current)
        if pending.settled:
            self._add_parameter_gradients(pending, terms)
        pending.settled = []

    def _add_parameter_gradients(self, pending: Pending, terms: int) -> None:
        """Parameters of their own: the squared gradient of the sum over all examples.

        Biased, since labels of the data have no mean zero. Every rank holds the gradient of the batch of all ranks: R
        shares of (√R N_rank)² add up to N². Ranks that run other passes of the same batch do not share it.
        """
        ranks = num_ranks(self.process_group) / self.sample_ranks
        scale = (terms if self.loss_reduction == "mean" else 1.0) * ranks**0.5
        alone = [entry for entry in self._due.values() if entry.module is None and entry.weight.grad is not None]
        gradients = [cast(Tensor, entry.weight.grad) * scale for entry in alone]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.dropped += 1
            return
        for entry, gradient in zip(alone, gradients):
            entry.block.add_output(pending.statistics.setdefault(entry.name, Statistics()), [], [gradient], None)


def make_collector(root: nn.Module, likelihood: Likelihood, fisher: FisherKind, *rest: Any) -> Collector:
    """The collector for this kind of Fisher matrix, with :class:`Collector`'s arguments."""
    return (EmpiricalCollector if fisher == "empirical" else Collector)(root, likelihood, fisher, *rest)
