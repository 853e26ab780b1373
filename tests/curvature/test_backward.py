"""Output gradients are read as a backward pass goes by, and are those that autograd returns."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from kfac_opt._capture.backward import OutputGraph


class Branches(nn.Module):
    """Layers above and beside each other, one called twice, one unused by the logits, an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(4, 6)
        self.last, self.apart = nn.Linear(6, 3), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        hidden = nn.functional.relu(self.first(x), inplace=True)
        hidden = self.left(self.left(hidden).tanh()) * self.gain + self.right(x)
        self.apart(x)
        return self.last(hidden.relu())


def edges_of(model, x):
    edges = []
    handles = [
        module.register_forward_hook(lambda *call: edges.append(get_gradient_edge(call[-1])))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, edges


def test_gradients_read_on_the_way_are_those_of_autograd():
    torch.manual_seed(0)
    model = Branches()
    logits, edges = edges_of(model, torch.randn(5, 4))
    column = torch.randn(5, 3)
    targets = [*edges, model.gain]
    expected = torch.autograd.grad(logits, targets, column, retain_graph=True, allow_unused=True)
    graph = OutputGraph(logits, targets)
    for _ in range(2):  # nothing of the first time is left in the graph
        received: dict[int, torch.Tensor] = {}
        graph.pull(column, received.__setitem__)
        found = [received.get(number) for number in range(len(targets))]
        assert [gradient is None for gradient in found] == [gradient is None for gradient in expected]
        assert any(gradient is None for gradient in found)  # the layer apart
        assert all(torch.equal(a, b) for a, b in zip(found, expected) if a is not None)
    logits.sum().backward()
    assert model.first.weight.grad is not None


def test_no_gradient_outlives_its_turn():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(7, 7) for _ in range(6)])
    logits, edges = edges_of(model, torch.randn(3, 7))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []

    def receive(number, gradient):
        most.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(gradient.untyped_storage()))

    OutputGraph(logits, edges).pull(torch.randn(3, 7), receive)
    assert len(most) == 6
    assert max(most) <= 1


def test_an_error_while_reading_leaves_no_hooks_behind():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    logits, edges = edges_of(model, torch.randn(2, 3))
    calls = []

    def receive(number, gradient):
        calls.append(number)
        raise KeyError("reading failed")

    try:
        OutputGraph(logits, edges).pull(torch.ones(2, 3), receive)
    except KeyError:
        calls.append(-1)
    logits.sum().backward()
    assert calls == [1, -1]
