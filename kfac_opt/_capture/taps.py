"""Gradients that reach parameters through the graph of one forward pass, read off during the user's own backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node


class Taps:
    """Reads, beside each parameter's accumulator, what this pass contributes to its gradient.

    ``.grad`` holds more than that: other passes, penalties on the weights, whatever scaling and averaging came after. The
    nodes in front of the accumulator belong to the pass alone.

    Args:
        starts: nodes from which the pass's graph is walked: those of its outputs.
        parameters: by name the parameters to watch.
        owner: whose passes this is one of. Nodes that an earlier one has walked over are not its own: a state may carry
            the graph of one pass into the next.
    """

    def __init__(self, starts: Iterable[Node], parameters: Mapping[str, Sequence[nn.Parameter | None]], owner: object) -> None:
        self.found: dict[str, list[Tensor | None]] = {name: [None] * len(members) for name, members in parameters.items()}
        places = {
            id(member): (name, index)
            for name, members in parameters.items()
            for index, member in enumerate(members)
            if member is not None
        }
        for node, number, parameter in accumulators(starts, mark=f"walked by {id(owner)}"):
            if id(parameter) in places:
                node.register_hook(_Tap(self.found, *places[id(parameter)], number))


class _Tap:
    """A hook behind a node, which reads one of the gradients that it hands on."""

    def __init__(self, found: dict[str, list[Tensor | None]], name: str, index: int, number: int) -> None:
        self.found, self.name, self.index, self.number = found, name, index, number

    @torch.no_grad()
    def __call__(self, handed_on: tuple[Tensor | None, ...], arrived: tuple[Tensor | None, ...]) -> None:
        gradient = handed_on[self.number]
        if gradient is not None and self.name in self.found:
            before = self.found[self.name][self.index]
            self.found[self.name][self.index] = gradient.clone() if before is None else before + gradient


def accumulators(starts: Iterable[Node], mark: str | None = None) -> list[tuple[Node, int, Tensor]]:
    """All edges of the graph that end in a leaf: the node, the number of the edge, and the leaf.

    Args:
        mark: written on every node; those that bear it already are left out, and what is behind them.
    """
    found: list[tuple[Node, int, Tensor]] = []
    done: dict[Node, None] = dict.fromkeys(starts)  # keeps them alive: they are compared by identity
    stack = list(done)
    while stack:
        node: Any = stack.pop()
        if mark is not None:
            if mark in node.metadata:
                continue
            node.metadata[mark] = True
        for number, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            leaf = getattr(child, "variable", None)
            if leaf is not None:
                found.append((node, number, leaf))
            elif child not in done:
                done[child] = None
                stack.append(child)
    return found
