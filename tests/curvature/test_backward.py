"""Output gradients are read as a backward pass goes by, and are those that autograd returns."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from kfac_opt import KFAC
from kfac_opt.curvature import collector
from kfac_opt.curvature.backward import gradients_at, read_gradients


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


@pytest.mark.parametrize("one_by_one", [True, False])
def test_gradients_read_on_the_way_are_those_of_autograd(one_by_one):
    torch.manual_seed(0)
    model = Branches()
    logits, edges = edges_of(model, torch.randn(5, 4))
    column = torch.randn(5, 3)
    expected = gradients_at(logits, [*edges, model.gain], column)
    for _ in range(2):  # nothing of the first time is left in the graph
        received: dict[int, torch.Tensor] = {}
        alone = read_gradients(logits, edges, [model.gain], column, received.__setitem__, one_by_one=one_by_one)
        assert torch.equal(alone[0], expected[-1])
        found = [received.get(number) for number in range(len(edges))]
        assert [gradient is None for gradient in found] == [gradient is None for gradient in expected[:-1]]
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

    read_gradients(logits, edges, [], torch.randn(3, 7), receive, one_by_one=True)
    assert len(most) == 6
    assert max(most) <= 1


def test_factors_do_not_depend_on_how_gradients_are_read(monkeypatch):
    """A layer called twice, one that is not used, several columns, EKFAC's scales."""
    found = []
    for limit in (0, 2**40):
        monkeypatch.setattr(collector, "ONE_BY_ONE_BYTES", limit)
        torch.manual_seed(0)
        model = Branches()
        optimizer = KFAC(model, curvature="eigenbasis", fisher="exact")
        for _ in range(2):
            torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([view.to_dense() for view in (optimizer.curvature[n] for n in ("first", "left", "right", "last"))])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_an_error_while_reading_leaves_no_hooks_behind():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    logits, edges = edges_of(model, torch.randn(2, 3))
    calls = []

    def receive(number, gradient):
        calls.append(number)
        raise KeyError("reading failed")

    try:
        read_gradients(logits, edges, [], torch.ones(2, 3), receive, one_by_one=True)
    except KeyError:
        calls.append(-1)
    logits.sum().backward()
    assert calls == [1, -1]
