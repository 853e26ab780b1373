"""Norm layers: 2x2 blocks per channel from per-example sums of ``(g x̂, g)``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import reference
from tests.support import Lambda, bare_kfac, close, data, estimate, gradients, pool, train_step

DOUBLE = torch.float64


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def behind_linear(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE))


def behind_convolution(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(2, 6, 2), norm, nn.Tanh(), Lambda(pool), nn.Linear(6, 3)).to(DOUBLE))


def behind_sequence(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), Lambda(lambda h: h.mean(1)), nn.Linear(6, 3)).to(DOUBLE))


def frozen_statistics(norm: nn.Module) -> nn.Module:
    """In evaluation mode, so that examples have Jacobians of their own, with statistics that are not trivial."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


CASES = {
    "layer norm": (lambda: behind_linear(nn.LayerNorm(6)), (5, 4)),
    "layer norm over positions": (lambda: behind_sequence(nn.LayerNorm(6)), (5, 3, 4)),
    "layer norm over two dimensions": (lambda: behind_sequence(nn.LayerNorm((3, 6))), (5, 3, 4)),
    "group norm": (lambda: behind_convolution(nn.GroupNorm(3, 6)), (4, 2, 4, 4)),
    "instance norm": (lambda: behind_convolution(nn.InstanceNorm2d(6, affine=True)), (4, 2, 4, 4)),
    "group norm on vectors": (lambda: behind_linear(nn.GroupNorm(2, 6)), (5, 4)),
    "batch norm 2d": (lambda: behind_convolution(frozen_statistics(nn.BatchNorm2d(6))), (4, 2, 4, 4)),
    "batch norm 1d": (lambda: behind_linear(frozen_statistics(nn.BatchNorm1d(6))), (5, 4)),
}


def norm_block(model: nn.Module, x: torch.Tensor, name: str = "1") -> torch.Tensor:
    f = reference.fisher_block(model, x, name)
    channels = model.get_submodule(name).weight.numel()
    channel = torch.arange(len(f)) % channels  # vec stacks the columns (scale, shift)
    return torch.where(channel[:, None] == channel[None, :], f, 0.0)


@pytest.mark.parametrize("case", CASES)
def test_block_is_the_exact_fisher_within_channels(case):
    make, shape = CASES[case]
    model = make()
    x = torch.randn(shape, dtype=DOUBLE)
    expected = norm_block(model, x)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["1"].to_dense(), expected)


@pytest.mark.parametrize("case", CASES)
def test_step_solves_each_channel(case):
    make, shape = CASES[case]
    model = make()
    x, y = torch.randn(shape, dtype=DOUBLE), torch.randint(3, shape[:1])
    block, norm = norm_block(model, x), model[1]
    optimizer = bare_kfac(model, damping=0.02)
    F.cross_entropy(model(x), y).backward()
    v = reference.weight_matrix(norm, norm.weight.grad.clone(), norm.bias.grad.clone())
    optimizer.precondition_gradients_()
    close(reference.weight_matrix(norm, norm.weight.grad, norm.bias.grad), reference.dense_solve(block, 0.02, v))


@pytest.mark.parametrize("case", ["layer norm", "group norm", "layer norm over positions"])
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_duplicating_every_example_changes_nothing(case, curvature):
    make, shape = CASES[case]
    x, y = torch.randn(shape, dtype=DOUBLE), torch.randint(3, shape[:1])
    results = []
    for copies in (1, 3):
        model = make()
        optimizer = bare_kfac(model, curvature=curvature)
        F.cross_entropy(model(torch.cat([x] * copies)), torch.cat([y] * copies)).backward()
        optimizer.precondition_gradients_()
        results.append((optimizer.curvature["1"].to_dense(), gradients(model)))
    close(results[1][0], results[0][0])
    for name in ("1.weight", "1.bias"):
        close(results[1][1][name], results[0][1][name])


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(6, bias=False), lambda: nn.LayerNorm(6)], ids=["no bias", "frozen bias"])
def test_scale_without_a_trained_shift(norm):
    model = behind_linear(norm())
    if model[1].bias is not None:
        model[1].bias.requires_grad_(False)
    x, _ = data(1)
    expected = reference.parameter_fisher_diagonal(model, x, model[1].weight)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    key = "1" if "1" in optimizer.curvature else "1.weight"
    close(optimizer.curvature[key].to_dense().diagonal(), expected)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(6), (8, 4)),
        (nn.BatchNorm2d(6), (4, 2, 4, 4)),
        (nn.BatchNorm1d(6, track_running_stats=False), (8, 4)),
    ],
    ids=["1d", "2d", "no running statistics"],
)
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_batch_norm_trains_in_training_mode(norm, shape, curvature):
    import copy

    model = (behind_linear if len(shape) == 2 else behind_convolution)(copy.deepcopy(norm))
    x, y = torch.randn(shape, dtype=DOUBLE), torch.randint(3, shape[:1])
    optimizer = bare_kfac(model, lr=0.05, damping=0.1, damping_scale="relative", kl_clip=1e-2, curvature=curvature)
    losses = [train_step(optimizer, model, x, y) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    block = optimizer.curvature["1"].to_dense()
    assert block.isfinite().all()
    assert torch.linalg.eigvalsh(block).min() >= -1e-12 * block.abs().max()


def test_running_statistics_are_those_of_training_without_kfac():
    stats = []
    for attached in (False, True):
        model = behind_convolution(nn.BatchNorm2d(6))
        if attached:
            optimizer = bare_kfac(model)
        x = torch.randn(4, 2, 4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            model(x)
            if attached:
                optimizer.step()
        stats.append((model[1].running_mean.clone(), model[1].running_var.clone(), model[1].num_batches_tracked.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*stats))


def test_norm_without_parameters_is_no_layer():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)).to(DOUBLE)
    assert list(bare_kfac(model).curvature) == ["0", "2"]


def test_a_norm_layer_called_twice_joins_the_calls_of_one_example():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.norm(torch.tanh(self.norm(self.first(x))))))

    torch.manual_seed(0)
    model, (x, _) = randomise(Twice().to(DOUBLE)), data()
    expected = norm_block(model, x, "norm")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["norm"].to_dense(), expected)
