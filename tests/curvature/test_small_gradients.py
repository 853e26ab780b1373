"""Finite gradients give finite directions, however small they are and in whatever precision; what is not finite is replaced."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from kfac_opt._curvature.linalg import damped_inverse, negligible, pi_correction, split_damped
from kfac_opt._curvature.spectral import damped_two_by_two_solve
from kfac_opt._step.safety import cast_to_parameters
from tests.support import bare_kfac

DOUBLE = torch.float64


class Branch(nn.Module):
    """A layer behind a factor: its gradients are as small as the factor says, those of the head are not."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.head, self.factor = layer, nn.Linear(6, 3), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.factor * self.layer(x).tanh())


class Shrunk(nn.Sequential):
    """All gradients are small."""

    def __init__(self, factor: float) -> None:
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * super().forward(x)


def small_net(kind: str, factor: float) -> nn.Module:
    torch.manual_seed(0)
    layers = {"norm": nn.LayerNorm(6), "linear": nn.Linear(6, 6)}
    return Branch(layers[kind], factor) if kind in layers else Shrunk(factor)


def train(model: nn.Module, **options: object) -> KFAC:
    torch.manual_seed(1)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    optimizer = KFAC(model, likelihood="gaussian" if isinstance(model, Shrunk) else "categorical", **options)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("factor", [1e-8, 1e-11, 1e-15, 1e-19, 1e-20, 1e-21, 1e-23])
@pytest.mark.parametrize(
    ("curvature", "style"),
    [("kronecker", "factored"), ("kronecker", "exact"), ("kronecker", "split"), ("eigenbasis", "exact"), ("diagonal", "exact")],
)
@pytest.mark.parametrize("kind", ["norm", "linear", "shrunk"])
@pytest.mark.filterwarnings("ignore:the likelihood:UserWarning")
def test_finite_gradients_of_any_size_leave_finite_weights(kind, curvature, style, factor):
    model = small_net(kind, factor)
    before = copy.deepcopy(model.state_dict())
    optimizer = train(model, lr=0.0, curvature=curvature, damping_style=style)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.replaced_directions == 0
    optimizer.detach()
    train(model, lr=0.1, curvature=curvature, damping_style=style)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("factor", [1.0, 1e-5, 1e-11, 1e-14])
@pytest.mark.parametrize("kind", ["norm", "linear", "shrunk"])
@pytest.mark.filterwarnings("ignore:the likelihood:UserWarning")
def test_directions_of_small_gradients_are_those_of_double_precision(kind, factor):
    found = []
    for dtype in (torch.float32, DOUBLE):
        torch.manual_seed(2)
        model = small_net(kind, factor).to(dtype)
        x, y = torch.randn(16, 6).to(dtype), torch.randint(3, (16,))
        likelihood = "gaussian" if kind == "shrunk" else "categorical"
        optimizer = KFAC(model, fisher="exact", damping=0.03, factor_dtype=dtype, likelihood=likelihood)
        F.cross_entropy(model(x), y).backward()
        optimizer.precondition_gradients_()
        found.append([p.grad.double() for p in model.parameters()])
    for single, double in zip(*found):
        # Damping 0.03 of the scale: condition below 1e4, eps 1e-7, sums of 16 rows.
        assert (single - double).norm() <= 2e-3 * double.norm()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-11, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_two_by_two_blocks_of_any_scale_are_solved(size, damping):
    torch.manual_seed(0)
    rows = torch.randn(50, 2, 3, dtype=DOUBLE)
    rows[0, :, 1:] = 0.0  # rank one
    rows[1, 1] = 1e-3 * rows[1, 1]
    block, vectors = rows @ rows.mT, torch.randn(50, 2, dtype=DOUBLE)
    expected = torch.linalg.solve(block + damping * torch.eye(2, dtype=DOUBLE), vectors)
    gamma = torch.tensor(damping * size)
    found = damped_two_by_two_solve((size * block).float(), gamma, (vectors * size**0.5).float())
    error = (found.double() * size**0.5 - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) <= (1e-2 if damping < 1.0 else 1e-5)


def test_a_matrix_of_denormal_numbers_goes_down_the_ladder_without_a_raw_error():
    inverse = damped_inverse(torch.full((1, 3, 3), 1e-44), torch.tensor([1e-45]))
    assert inverse.shape == (1, 3, 3)


def test_pi_of_factors_whose_quotient_leaves_the_range():
    means = torch.tensor([1e6, 1e-33, 0.0, 1.0, 1e-40]), torch.tensor([1e-33, 1e6, 1.0, 4.0, 1.0])
    expected = torch.tensor([1e39**0.5, 1e-39**0.5, 1.0, 0.5, 1.0])
    torch.testing.assert_close(pi_correction(*means), expected)
    assert 0.0 < negligible(torch.float32) < 1e-33


def test_split_damping_far_above_the_curvature_is_the_damping():
    eigenvalues = torch.full((1, 2, 3), 1e-42)
    torch.testing.assert_close(split_damped(eigenvalues, torch.tensor(1.0)), torch.ones(1, 2, 3))


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_a_direction_that_is_not_finite_gives_way_to_the_plain_gradient_and_is_counted(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    once = {"factor_interval": 100, "inverse_interval": 100, "factor_dtype": torch.float32}
    optimizer = bare_kfac(model, lr=0.1, curvature=curvature, **once)
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if optimizer.state[model[0].weight]:
            state = optimizer.state[model[0].weight]["curvature"]
            key = {"kronecker": "output_inverse", "eigenbasis": "scales", "diagonal": "diagonal"}[curvature]
            state[key].fill_(math.nan)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    assert optimizer.replaced_directions == 1
    moved = [old - new.detach() for old, new in zip(before, model.parameters())]
    torch.testing.assert_close(moved[0], 0.1 * model[0].weight.grad)  # no clip and no bound here
    assert all(torch.isfinite(part).all() for part in moved)


def test_a_gradient_that_is_not_finite_is_not_counted():
    model = nn.Linear(4, 2)
    optimizer = bare_kfac(model, factor_dtype=torch.float32)
    F.cross_entropy(model(torch.randn(8, 4)), torch.randint(2, (8,))).backward()
    model.weight.grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.replaced_directions == 0


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("kl_clip", [1e-3, None])
def test_half_precision_weights_take_a_shortened_direction_that_single_precision_holds(momentum, kl_clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).half()
    optimizer = KFAC(model, update_scale="natural", lr=0.1, momentum=momentum, kl_clip=kl_clip, damping=1e-4)
    x, y = torch.randn(8, 4).half(), torch.randint(2, (8,))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(model(x).float(), y)).backward()
        with torch.no_grad():
            for state in (optimizer.state[p].get("curvature") for p in model.parameters()):
                if state:  # as where the gradients of the sampled labels are 1e-5: directions around 1e7
                    for key in ("output_inverse", "input_inverse"):
                        state[key].fill_(0.0).diagonal(dim1=-2, dim2=-1).fill_(1e4)
        optimizer.step()
    for old, parameter in zip(before, model.parameters()):
        assert bool(torch.isfinite(parameter).all())
        assert not torch.equal(old, parameter)
        if momentum:
            assert bool(torch.isfinite(optimizer.state[parameter]["momentum_buffer"]).all())


def test_half_precision_casts_keep_the_direction():
    direction, parameter = torch.tensor([3e6, -4e6]), torch.zeros(2, dtype=torch.float16)
    (cast,) = cast_to_parameters([direction], [parameter], 0.9)
    assert cast.dtype == torch.float16
    assert float(cast.abs().max()) <= 0.05 * 65504 * 1.001
    torch.testing.assert_close(cast[0] / cast[1], torch.tensor(-0.75, dtype=torch.float16), rtol=2e-3, atol=0.0)
