"""The diagonal of the Fisher matrix, and models that take gradients of their own, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfac_opt.fisher import FisherMatrix
from tests.fisher.brute import exact_fisher, label_fisher
from tests.fisher.models import NAMES, make
from tests.support import close

ROUTES = ("dense", "gram", "factored", "streamed", "func")
DOUBLE = torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_the_diagonal_is_that_of_the_brute_force_matrix(name: str):
    model, x = make(name)
    expected = exact_fisher(model, x).diagonal()
    for route in ROUTES:
        for blocks in ("full", "layer_wise"):
            close(FisherMatrix(model, x, blocks=blocks, route=route).diagonal(), expected)


@pytest.mark.parametrize("route", ROUTES)
def test_the_diagonal_of_drawn_and_given_labels(route: str):
    model, x = make("lenet")
    drawn = FisherMatrix(model, x, kind="mc", label_samples=3, route=route)
    close(drawn.diagonal(), label_fisher(model, x, drawn.labels).diagonal())
    targets = torch.randint(3, (len(x),), generator=torch.Generator().manual_seed(1))
    given = FisherMatrix(model, (x, targets), kind="empirical", route=route)
    close(given.diagonal(), label_fisher(model, x, targets.unsqueeze(1)).diagonal())


def test_the_diagonal_lies_in_the_order_of_the_parameters():
    model, x = make("lenet")
    fisher = FisherMatrix(model, x, route="streamed")
    parts = fisher.diagonal().split([p.numel() for p in model.parameters()])
    dense = fisher.to_dense()
    start = 0
    for parameter, part in zip(model.parameters(), parts):
        close(part, dense.diagonal()[start : start + parameter.numel()])
        start += parameter.numel()
    close(fisher.diagonal().sum(), fisher.trace())


def test_the_diagonal_keeps_within_the_memory_limit():
    """Rows come a few at a time: the limit holds fewer than all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 10)).double()
    x = torch.randn(64, 20, dtype=DOUBLE)
    rows = 64 * 9 * sum(p.numel() for p in model.parameters()) * 8
    fisher = FisherMatrix(model, x, route="streamed", memory_limit=rows // 4)
    close(fisher.diagonal(), FisherMatrix(model, x, route="dense").diagonal())


class Forces(nn.Module):
    """The output is a gradient of the net in its input, as forces are."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        place = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(place).sum(), place, create_graph=True)[0]


class Residual(nn.Module):
    """The net beside its derivative, as in the residual of a differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            value = self.net(place)
            slope = torch.autograd.grad(value.sum(), place, create_graph=True)[0]
        return value + slope[:, :1] - slope[:, 1:]


class Adaptive(nn.Module):
    """Takes a gradient of its own only where gradients are on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.net(x)[:0]
        return Residual.forward(self, x)


INNER = {"forces": (Forces, 3), "residual": (Residual, 2), "where gradients are on": (Adaptive, 2)}


@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize("kind", INNER)
def test_models_that_take_gradients_of_their_own(kind: str, route: str | None):
    torch.manual_seed(0)
    build, width = INNER[kind]
    model, x = build(), torch.randn(6, width, dtype=DOUBLE)
    expected = exact_fisher(model, x, "gaussian")
    fisher = FisherMatrix(model, x, "gaussian", route=route)
    close(fisher.to_dense(), expected, rtol=1e-9)
    close(fisher.diagonal(), expected.diagonal(), rtol=1e-9)
    vectors = torch.randn(len(expected), 2, dtype=DOUBLE)
    close(fisher @ vectors, expected @ vectors, rtol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_outputs_carry_no_graph_where_gradients_are_off():
    model, x = make("lenet")
    fisher = FisherMatrix(model, x)
    batch = next(iter(fisher._source.data))
    with torch.no_grad():
        assert not fisher._source.model.forward(batch)[0].requires_grad
    assert fisher._source.model.forward(batch)[0].requires_grad
