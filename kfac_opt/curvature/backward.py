"""Gradients at the outputs of layers, one by one as a backward pass reaches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfac_opt.curvature.hooks import without_hooks

Receive = Callable[[int, Tensor], None]


def gradients_at(logits: Tensor, targets: Any, column: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``<column, logits>`` at edges and parameters; the graph stays, hooks of parameters do not run."""
    with without_hooks(targets):
        return torch.autograd.grad(logits, targets, column, retain_graph=True, allow_unused=True)


def read_gradients(
    logits: Tensor,
    edges: Sequence[GradientEdge],
    parameters: Sequence[nn.Parameter],
    column: Tensor,
    receive: Receive,
    *,
    one_by_one: bool,
) -> tuple[Tensor | None, ...]:
    """Like :func:`gradients_at`, each gradient at an edge given away as it comes.

    Asking autograd for all of them returns all of them together: as much memory as the outputs of all layers (for a
    ResNet18 of batch 64 with its BatchNorm layers 310 MB). One by one only edges without another one beneath them are asked
    for; the others lie on the way, are read as the pass comes by, and no gradient outlives its turn. That takes 0.2-0.4 ms
    more, which small models notice.

    Args:
        receive: ``receive(number of the edge, gradient)`` for each edge that the pass reaches.

    Returns:
        The gradients at ``parameters``, None for those that the logits do not depend on.
    """
    assert logits.grad_fn is not None
    passed = _above_others(logits.grad_fn, {edge.node for edge in edges}) if one_by_one else set()
    handles, last = [], []
    for number, edge in enumerate(edges):
        if edge.node in passed:
            handles.append(edge.node.register_prehook(_Reader(number, edge.output_nr, receive)))
        else:
            last.append((number, edge))
    try:
        found = gradients_at(logits, [*(edge for _, edge in last), *parameters], column)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for (number, _), gradient in zip(last, found):
            if gradient is not None:
                receive(number, gradient)
    return found[len(last) :]


def _above_others(start: Node, nodes: set[Node]) -> set[Node]:
    """Those of ``nodes`` from which the graph leads to another one of them."""
    reaches: dict[Node, bool] = {}  # by nodes that are done; also keeps them alive, for they are compared by identity
    stack = [start]
    while stack:
        node = stack[-1]
        if node in reaches:
            stack.pop()
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        todo = [child for child in children if child not in reaches]
        if todo:
            stack += todo
            continue
        reaches[node] = any(reaches[child] or child in nodes for child in children)
        stack.pop()
    return {node for node in nodes if reaches.get(node, False)}


class _Reader:
    """A hook in front of a node, which reads one of the gradients that arrive there."""

    def __init__(self, number: int, output_nr: int, receive: Receive) -> None:
        self.number, self.output_nr, self.receive = number, output_nr, receive

    @torch.no_grad()
    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self.output_nr]
        if gradient is not None:
            self.receive(self.number, gradient)
