"""The true Fisher matrix: output gradients of the likelihood, pulled back to the layers' outputs at the end of each pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac_opt._capture.backward import OutputGraph
from kfac_opt._capture.due import Due, Estimate, Tracked
from kfac_opt._capture.finite import all_finite
from kfac_opt._capture.passes import Pass, Pending, Tally
from kfac_opt._capture.proof import Evidence
from kfac_opt._capture.proving import Proving
from kfac_opt._capture.repeatable import RepeatableGraph
from kfac_opt._capture.replays import hand_to_parts
from kfac_opt._capture.rounding import Rounding
from kfac_opt._capture.status import LayerStatuses
from kfac_opt._capture.sums import Sums
from kfac_opt._curvature.precision import full_precision
from kfac_opt.likelihoods import output_gradients


class LikelihoodGradients:
    """A source that needs no backward of the user (see :class:`kfac_opt._capture.source.GradientSource`)."""

    def __init__(self, estimate: Estimate, due: Due, statuses: LayerStatuses, proving: Proving, sums: Sums, tally: Tally) -> None:
        self.estimate, self.due, self.statuses = estimate, due, statuses
        self.proving, self.sums, self.tally = proving, sums, tally
        self.rounding: Rounding = sums.rounding
        self._pass_index = 0

    def on_call(self, current: Pass, name: str, edge: GradientEdge) -> None:
        """Nothing: the edges are walked to at the end of the pass."""

    def settle(self, pending: Pending) -> None:
        """Nothing waits."""

    def complete(self, pending: Pending, sample_ranks: int) -> None:
        """All sums have their scale."""

    def end_step(self) -> None:
        """Layers that are hidden are refused by the optimizer."""

    def start_step(self) -> None:
        """Numbers passes anew."""
        self._pass_index = 0

    def collect(self, current: Pass, logits: Tensor, mask: Tensor | None, pending: Pending) -> None:
        """Output gradients of the likelihood, back to the layers' outputs only, into sums."""
        generator = self.estimate.make_generator(self._pass_index, logits.device)
        self._pass_index += 1
        alone = self.due.alone()
        if not current.edges and not alone:
            pending.num_terms += current.num_terms  # terms there are: their layers have to be looked for elsewhere
            return
        columns = output_gradients(
            self.estimate.likelihood,
            logits,
            kind=cast(Literal["mc", "exact"], self.estimate.fisher),
            num_labels=self.estimate.label_samples,
            mask=mask,
            generator=generator,
        )
        with full_precision(logits.device):
            columns = self._look_for_rounding(current, logits, columns, alone)
            for column in columns:
                self._take_column(current, logits, column, alone)
        current.graph = None
        if current.masked:
            self.sums.take_inputs(current)
        if all_finite(current.statistics.values()):
            pending.num_terms += current.num_terms
            pending.keep(current)
        else:
            self.tally.drop()

    def _look_for_rounding(
        self, current: Pass, logits: Tensor, columns: Iterator[Tensor], alone: list[Tracked]
    ) -> Iterator[Tensor]:
        """Finds blocks whose gradients are rounding, with the first of the columns; gives all of them back."""
        edges = [(name, edge) for name, found in current.edges.items() for edge in found]
        owners = [name for name, _ in edges] + [tracked.name for tracked in alone]
        column = next(columns, None) if self.rounding.due(owners) else None
        if column is None:
            return columns

        graph = self._graph(current, logits, [*(edge for _, edge in edges), *(tracked.weight for tracked in alone)])
        with self._naming_hidden(), graph.untouched():
            self.rounding.look(graph.pull, column, owners)
        return chain([column], columns)

    def _take_column(self, current: Pass, logits: Tensor, column: Tensor, alone: list[Tracked]) -> None:
        """One column of output gradients; the first of a pass also proves layers."""
        pulled = _Column(current, alone, self.proving, self.sums)
        if not pulled.targets:
            return  # the column before has shown that no layer is what it seemed
        graph = self._graph(current, logits, pulled.targets)
        with self._naming_hidden(), graph.untouched():
            graph.pull(column, pulled.receive)
        pulled.finish()

    def _graph(self, current: Pass, logits: Tensor, targets: list[Any]) -> RepeatableGraph:
        """The graph from the logits to these targets, of which later columns leave some out."""
        if current.graph is None or len(current.graph.graph.edges) != len(targets):
            names = [n for n in self.statuses.hidden if n in self.due.entries and n not in current.calls]
            hidden = {name: self.due.entries[name].weight for name in names}
            current.graph = RepeatableGraph(self.estimate.root, OutputGraph(logits, targets), "curvature estimate", hidden)
            current.graph.check()
        return current.graph

    @contextmanager
    def _naming_hidden(self) -> Iterator[None]:
        """Says which layers a reentrant checkpoint hides, where autograd only says that there is one."""
        try:
            yield
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            names = ", ".join(repr(name) for name in sorted(self.statuses.hidden)) or "a layer"
            raise RuntimeError(
                f"{names} runs inside a reentrant checkpoint, which hides it from hooks and from autograd.grad. Use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            ) from error


class _Column:
    """Takes the gradients of one backward pass as they come, and holds on to those only that have to wait for others.

    Args:
        alone: parameters outside layers.

    Attributes:
        targets: whose gradients are wanted: edges of calls, parameters outside layers, parameters of layers to be proven.
    """

    def __init__(self, current: Pass, alone: list[Tracked], proving: Proving, sums: Sums) -> None:
        self.current, self.alone, self.proving, self.sums = current, alone, proving, sums
        self.calls = [(name, index) for name, edges in current.edges.items() for index in range(len(edges))]
        self.own = proving.own_parameters(current)
        self.to_prove = [p for members in self.own.values() for p in members if p is not None]
        self.held = set(current.held)
        parameters = [*(tracked.weight for tracked in alone), *self.to_prove]
        self.targets: list[Any] = [*(current.edges[name][index] for name, index in self.calls), *parameters]
        self.found: list[Tensor | None] = [None] * len(parameters)
        self.arrived: dict[str, list[Tensor | None]] = {}
        self.evidence: dict[str, Evidence] = {}

    def receive(self, number: int, gradient: Tensor) -> None:
        """The gradient of a target."""
        if number >= len(self.calls):
            self.found[number - len(self.calls)] = gradient
            return
        name, index = self.calls[number]
        gradients = self.arrived.setdefault(name, [None] * len(self.current.edges[name]))
        gradients[index] = gradient
        waits = name in self.held or name in self.current.replays
        if len(gradients) == 1 and not waits:  # the calls of one example belong together
            self.proving.note(self.evidence, self.current, name, gradients)
            self.sums.add_output(self.current, name, self.arrived.pop(name))

    @torch.no_grad()
    def finish(self) -> None:
        """The pass is over."""
        current = self.current
        hand_to_parts(current, self.arrived)
        for name in {**self.arrived, **self.own}:
            self.proving.note(self.evidence, current, name, self.arrived.get(name, []))
        if self.own or self.held:
            reached = dict(zip(map(id, self.to_prove), self.found[len(self.alone) :]))
            proof = {name: [reached.get(id(p)) for p in members] for name, members in self.own.items()}
            self.proving.judge(current, self.evidence, proof)
        for name, gradients in self.arrived.items():
            if name in current.calls:
                self.sums.add_output(current, name, gradients)
        for entry, gradient in zip(self.alone, self.found):
            if gradient is not None:
                self.sums.add_parameter(current, entry, gradient)
