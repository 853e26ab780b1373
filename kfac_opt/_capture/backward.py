"""Backward passes that nobody but the capture sees: no hook runs, and each gradient is given away as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Receive = Callable[[int, Tensor], None]


class OutputGraph:
    """The part of the graph between a model's logits and some edges, for any number of backward passes.

    ``torch.autograd.grad`` would run whatever hooks the user put on tensors, nodes and modules in between: on gradients of
    labels that the user never saw, and a second time. Here every node is called by itself, in the order in which the engine
    would take them. A node is called inside a backward pass of the engine over the same edges, since it is from there that
    it knows which of its gradients nobody wants: the products for weights are left out.

    Args:
        logits: where the passes start; the graph stays as it is.
        targets: edges, or parameters, whose gradients are wanted.

    Attributes:
        executed: nodes that a pass calls, in their order.
        leaves: all leaves that the logits depend on, by ``id``.
    """

    def __init__(self, logits: Tensor, targets: Sequence[GradientEdge | Tensor]) -> None:
        self.logits = logits
        self.edges = [target if isinstance(target, GradientEdge) else get_gradient_edge(target) for target in targets]
        self.start = get_gradient_edge(logits)
        self._wanted: dict[Node, list[tuple[int, int]]] = {}
        for number, edge in enumerate(self.edges):
            self._wanted.setdefault(edge.node, []).append((number, edge.output_nr))
        self._next: dict[Node, tuple[tuple[Node | None, int], ...]] = {}  # keeps the nodes alive: they compare by identity
        self._leading = self._walk()
        self.order = self._sorted()
        self.executed = [node for node in self.order if any(child in self._leading for child, _ in self._next[node])]
        self._called = set(self.executed)

    @property
    def leaves(self) -> dict[int, Tensor]:
        found = [node.variable for node in self._next if hasattr(node, "variable")]
        return {id(leaf): leaf for leaf in found}

    def _walk(self) -> set[Node]:
        """Nodes from which the graph leads to a target, the targets themselves included."""
        leading: set[Node] = set()
        done: set[Node] = set()
        stack = [self.start.node]
        while stack:
            node = stack[-1]
            if node not in self._next:
                self._next[node] = children = node.next_functions
                todo = [child for child, _ in children if child is not None and child not in self._next]
                if todo:
                    stack += todo
                    continue
            stack.pop()
            if node in done:
                continue
            done.add(node)
            if node in self._wanted or any(child in leading for child, _ in self._next[node]):
                leading.add(node)
        return leading

    def _sorted(self) -> list[Node]:
        """Topological, and of the nodes that are ready the one made last first: sums are formed in the engine's order."""
        waiting: dict[Node, int] = {}
        for node in self._leading:
            for child, _ in self._next[node]:
                if child in self._leading:
                    waiting[child] = waiting.get(child, 0) + 1
        ready: list[tuple[int, int, Node]] = []
        order: list[Node] = []
        if self.start.node in self._leading:
            heappush(ready, (0, 0, self.start.node))
        while ready:
            node = heappop(ready)[2]
            order.append(node)
            for child, _ in self._next[node]:
                if child not in self._leading:
                    continue
                waiting[child] -= 1
                if waiting[child] == 0:
                    heappush(ready, (-child._sequence_nr(), len(order) * 2**20 + len(ready), child))
        return order

    def pull(self, column: Tensor, receive: Receive) -> None:
        """One pass of ``<column, logits>``: ``receive(number of the target, gradient)`` for each that it reaches."""
        if not self.order:
            return
        arrived: list[Tensor | None] = [column]

        def run() -> None:
            self._run(arrived.pop(), receive)

        with torch.enable_grad(), _without_anomaly_mode():
            gate = _Gate.apply(self.logits, run)
            with suppress(_Finished):
                torch.autograd.grad(gate, self.edges, torch.zeros_like(gate), retain_graph=True, allow_unused=True)

    def _run(self, column: Tensor | None, receive: Receive) -> None:
        inbox: dict[Node, dict[int, Tensor | None]] = {self.start.node: {self.start.output_nr: column}}
        del column
        for node in self.order:
            arrived = inbox.pop(node, None)
            if arrived is None:
                continue
            for number, output_nr in self._wanted.get(node, ()):
                gradient = arrived.get(output_nr)
                if gradient is not None:
                    receive(number, gradient)
                    del gradient
            if node not in self._called:
                continue
            for (child, input_nr), gradient in zip(*self._call(node, arrived)):
                if gradient is None or child not in self._leading:
                    continue
                assert child is not None
                gradient = _as_expected(gradient, child._input_metadata[input_nr])  # type: ignore[attr-defined]
                box = inbox.setdefault(child, {})
                before = box.get(input_nr)
                box[input_nr] = gradient if before is None else before + gradient
            del arrived

    def _call(self, node: Node, arrived: dict[int, Tensor | None]) -> tuple[Sequence[tuple[Node | None, int]], Sequence[Any]]:
        """Next edges of a node, and the gradients that it sends along them."""
        expected = node._input_metadata  # type: ignore[attr-defined]
        arguments = [arrived.get(number) for number in range(len(expected))]
        children = self._next[node]
        if not isinstance(node, BackwardCFunction):
            found = node(*arguments)  # type: ignore[operator]
            return children, found if isinstance(found, tuple) else (found,)
        # A Function gives one gradient for each argument of its forward, tensor or not; it has edges for tensors alone.
        filled = [_zeros(meta) if g is None else g for g, meta in zip(arguments, expected)]
        returned = node.apply(*filled)
        returned = returned if isinstance(returned, tuple) else (returned,)
        wanted = [g for g, needed in zip(returned, node.needs_input_grad) if needed]
        return [edge for edge in children if edge[0] is not None], wanted


class _Finished(Exception):
    """All gradients have been given away."""


class _Gate(torch.autograd.Function):
    """Runs a function inside a backward pass of the engine, and ends the pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            ctx.run()
        raise _Finished


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)


def _as_expected(gradient: Tensor, meta: Any) -> Tensor:
    """The gradient in the shape and dtype of the tensor that it belongs to, as the engine would hand it on."""
    if meta.is_nested_tensor:
        return gradient
    if gradient.shape != meta.shape:
        gradient = gradient.sum_to_size(meta.shape)
    if gradient.dtype != meta.dtype:
        if gradient.is_complex() and not meta.dtype.is_complex:
            gradient = gradient.real
        gradient = gradient.to(meta.dtype)
    return gradient


@contextmanager
def _without_anomaly_mode() -> Iterator[None]:
    """Anomaly mode reports every exception in a backward pass, the one that ends ours as well."""
    if not torch.is_anomaly_enabled():
        yield
        return
    with torch.autograd.set_detect_anomaly(False):
        yield
