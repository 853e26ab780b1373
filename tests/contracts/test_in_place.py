"""The same curvature whether what follows a layer works in place or not: also where the layer's output is a view."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt._curvature.edges import output_edge
from kfac_opt.bayes.laplace import fit_laplace
from kfac_opt.fisher import FisherMatrix
from tests import reference
from tests.support import assert_same, bare_kfac, close

DOUBLE = torch.float64


class Net(nn.Module):
    """``layer``, what comes after its output (in place or not), the mean over the positions, ``head``.

    Args:
        channels_last: whether the layer's features are the last dimension, or the one behind the examples.
        batched: False for a layer that is given each example without its batch dimension.
    """

    def __init__(
        self, layer: nn.Module, features: int, after: Callable[[Tensor], Tensor], *, channels_last: bool, batched: bool = True
    ):
        super().__init__()
        self.layer, self.head, self.after = layer, nn.Linear(features, 3), after
        self.channels_last, self.batched = channels_last, batched

    def forward(self, x: Tensor) -> Tensor:
        h = self.after(self.layer(x if self.batched else x.squeeze(0)))
        h = h if self.batched else h.unsqueeze(0)
        h = h.flatten(1, -2).mean(1) if self.channels_last and h.dim() > 2 else h
        return self.head(h if h.dim() == 2 else h.flatten(2).mean(2))


def in_place(h: Tensor) -> Tensor:
    return h.tanh_()


def out_of_place(h: Tensor) -> Tensor:
    return h.tanh()


def part_before_in_place(h: Tensor) -> Tensor:
    early = h * 0.5
    return early + h.tanh_()


def part_before_out_of_place(h: Tensor) -> Tensor:
    return h * 0.5 + h.tanh()


def written_slice(h: Tensor) -> Tensor:
    h[..., :1].mul_(2.0)
    return h


def scaled_slice(h: Tensor) -> Tensor:
    return torch.cat([h[..., :1] * 2.0, h[..., 1:]], -1)


AFTER = {
    "whole": (in_place, out_of_place),
    "part of it before": (part_before_in_place, part_before_out_of_place),
    "a slice": (written_slice, scaled_slice),
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    # name: layer, its input of three examples, features, features last
    "Linear, 2-D": (lambda: nn.Linear(3, 4), (3, 3), 4, True),
    "Linear, 3-D": (lambda: nn.Linear(3, 4), (3, 2, 3), 4, True),
    "Linear, 4-D": (lambda: nn.Linear(3, 4), (3, 2, 2, 3), 4, True),
    "Linear without bias, 3-D": (lambda: nn.Linear(3, 4, bias=False), (3, 2, 3), 4, True),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 2), (3, 2, 4), 4, False),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 2), (3, 2, 3, 3), 4, False),
    "Conv2d, circular": (lambda: nn.Conv2d(2, 4, 2, padding=1, padding_mode="circular"), (3, 2, 3, 3), 4, False),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 3, 2, 2), 4, False),
}

UNBATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "Linear": (lambda: nn.Linear(3, 4), (1, 3), 4, True),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 2), (1, 2, 4), 4, False),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 2), (1, 2, 3, 3), 4, False),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 3, 2, 2), 4, False),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(2, affine=True), (1, 2, 4), 2, False),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, affine=True), (1, 2, 3, 3), 2, False),
}

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "LayerNorm, 2-D": (lambda: nn.LayerNorm(4), (3, 4), 4, True),
    "LayerNorm, 3-D": (lambda: nn.LayerNorm(4), (3, 2, 4), 4, True),
    "RMSNorm, 3-D": (lambda: nn.RMSNorm(4), (3, 2, 4), 4, True),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 3), 4, False),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4, 3), 4, False),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 2, 2), 4, False),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(2, affine=True), (3, 2, 4), 2, False),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, affine=True), (3, 2, 3, 3), 2, False),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), (3, 2, 2, 2, 2), 2, False),
}

ALL = {**LAYERS, **NORMS, **{f"{name}, unbatched": case for name, case in UNBATCHED.items()}}
FISHERS = ["mc", "exact", "empirical"]


def build(name: str, after: Callable[[Tensor], Tensor], *, batched: bool | None = None) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    layer, shape, features, last = ALL[name]
    batched = not name.endswith("unbatched") if batched is None else batched
    net = Net(layer(), features, after, channels_last=last, batched=batched).to(DOUBLE)
    return net, torch.randn(shape, dtype=DOUBLE)


def estimated(model: nn.Module, x: Tensor, **options) -> dict[str, Tensor]:
    """The layer's curvature after one step."""
    optimizer = bare_kfac(model, generator=torch.Generator().manual_seed(0), **options)
    y = torch.arange(len(x)) % 3
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return {name: view.to_dense() for name, view in optimizer.curvature.items()}


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", ALL)
def test_an_operation_in_place_changes_no_curvature(name, after, fisher, curvature):
    found = [estimated(*build(name, way), fisher=fisher, curvature=curvature) for way in AFTER[after]]
    assert found[1]["layer"].diagonal().sum() > 0
    for key in found[1]:
        close(found[0][key], found[1][key], rtol=1e-9)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", LAYERS)
def test_factors_behind_an_operation_in_place_are_those_of_brute_force(name, after):
    expected = reference.kronecker_factors(*build(name, AFTER[after][1]), "layer")
    model, x = build(name, AFTER[after][0])
    close(estimated(model, x)["layer"], reference.dense_kronecker(*expected), rtol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_empirical_factors_behind_an_operation_in_place_are_those_of_brute_force(name):
    model, x = build(name, out_of_place)
    expected = reference.empirical_factors(model, x, "layer", lambda out, n: F.cross_entropy(out, torch.tensor([n % 3])))
    found = estimated(build(name, in_place)[0], x, fisher="empirical")["layer"]
    close(found, reference.dense_kronecker(*expected), rtol=1e-9)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", UNBATCHED)
def test_a_single_example_without_a_batch_dimension_is_a_batch_of_one(name, fisher):
    name = f"{name}, unbatched"
    found = estimated(*build(name, in_place), fisher=fisher)
    expected = estimated(*build(name, out_of_place, batched=True), fisher=fisher)
    for key in expected:
        close(found[key], expected[key], rtol=1e-9)


class Reused(nn.Module):
    """One layer, called once with and once without an operation in place behind it."""

    def __init__(self, after: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer, self.head, self.after = nn.Linear(3, 3), nn.Linear(3, 3), after

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.after(self.layer(x)))).mean(1))


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_a_shared_layer_keeps_all_its_calls(fisher, curvature):
    x, found = torch.randn(4, 2, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)), []
    for after in (in_place, out_of_place):
        torch.manual_seed(0)
        found.append(estimated(Reused(after).to(DOUBLE), x, fisher=fisher, curvature=curvature))
    for key in found[1]:
        close(found[0][key], found[1][key], rtol=1e-9)


class OwnForward(nn.Linear):
    """A layer of one's own, whose forward is held against its adapter first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_is_proven_behind_an_operation_in_place():
    found = []
    for after in (in_place, out_of_place):
        torch.manual_seed(0)
        net = Net(OwnForward(3, 4), 4, after, channels_last=True).to(DOUBLE)
        found.append(estimated(net, torch.ones(3, 2, 3, dtype=DOUBLE)))
    assert found[1]["layer"].diagonal().sum() > 0
    close(found[0]["layer"], found[1]["layer"], rtol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_fisher_matrix_and_laplace_see_through_an_operation_in_place(name):
    matrices, precisions = [], []
    for after in (in_place, out_of_place):
        model, x = build(name, after)
        matrices.append(FisherMatrix(model, x, kind="exact", blocks="layer_wise").to_dense())
        posterior = fit_laplace(model, [(x, torch.arange(len(x)) % 3)], prior_precision=1.0)
        precisions.append(posterior.variance())
    close(matrices[0], matrices[1], rtol=1e-9)
    for key, value in precisions[1].items():
        close(precisions[0][key], value, rtol=1e-6)


def test_strided_views_are_read_off_their_base_and_views_of_the_input_are_left_alone():
    base = torch.randn(4, 6, dtype=DOUBLE, requires_grad=True) * 1.0
    out = base[1:, ::2].mT
    edge, view = output_edge(out, torch.ones(1))
    cotangent = torch.randn(3, 3, dtype=DOUBLE)
    assert view is not None
    (arrived,) = torch.autograd.grad(out, [edge], cotangent)
    assert_same(view.take(arrived), cotangent)
    _, view = output_edge(out, base)
    assert view is None
