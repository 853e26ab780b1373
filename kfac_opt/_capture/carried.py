"""Inputs of the model that depend on its parameters, through passes before: a loop that the estimate cannot see."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten

from kfac_opt._capture.saying import say
from kfac_opt._capture.taps import accumulators

LOOKS = 8  # passes whose inputs carry a graph, until it is taken to be another model's


class CarriedGraphs:
    """Says once that a pass depends on the parameters through its inputs."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.left = LOOKS

    def look(self, inputs: Any) -> None:
        """Looks at the inputs of a pass that begins."""
        if self.left == 0:
            return
        leaves = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        if not leaves:
            return
        self.left -= 1
        own = {id(parameter) for parameter in self.root.parameters()}
        if any(id(leaf) in own for _, _, leaf in accumulators(cast(Node, leaf.grad_fn) for leaf in leaves)):
            self.left = 0
            say(
                "the input of the model carries a graph that leads to the model's own parameters (a state or an output of an "
                "earlier call). The Fisher matrix takes each call for a pass of its own, and layers whose outputs depend on "
                "earlier calls get less curvature than they have, or diagonal blocks. Put the loop over the calls into the "
                "forward of one module and build the optimizer with that, or detach() what is carried."
            )
