"""``mc`` is unbiased for ``exact`` with the variance it should have; ``empirical`` is what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import reference
from tests.support import Lambda, Sequence, Twice, bare_kfac, close, data, estimate, mlp, pool

DOUBLE = torch.float64


def mean_and_error(samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of independent estimates, and four standard errors of it (plus rounding)."""
    stack = torch.stack(samples)
    return stack.mean(0), 4 * stack.std(0) / len(samples) ** 0.5 + 1e-12


def convolution() -> tuple[nn.Module, torch.Tensor, str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), Lambda(pool), nn.Linear(3, 3)).to(DOUBLE)
    return model, torch.randn(3, 2, 4, 4, dtype=DOUBLE), "0"


def sequence(per_token: bool) -> tuple[nn.Module, torch.Tensor, str]:
    torch.manual_seed(0)
    return Sequence(per_token=per_token).to(DOUBLE), torch.randn(3, 4, 3, dtype=DOUBLE), "inner"


CASES = {
    "mlp": lambda: (mlp(), data()[0], "0"),
    "convolution": convolution,
    "sequence": lambda: sequence(False),
    "tokens": lambda: sequence(True),
    "twice": lambda: (Twice().to(DOUBLE), data(4)[0], "shared"),
}


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("labels", [1, 5])
def test_sampled_output_factor_is_unbiased(likelihood, labels):
    model, (x, _) = mlp(), data()
    expected = reference.kronecker_factors(model, x, "0", likelihood)[1]
    optimizer = bare_kfac(
        model, fisher="mc", label_samples=labels, likelihood=likelihood, factor_decay=0.0, inverse_interval=10**6
    )
    samples = []
    for _ in range(400):
        estimate(optimizer, model, x)
        samples.append(optimizer.curvature["0"].output_factor.clone())
    mean, error = mean_and_error(samples)
    assert ((mean - expected).abs() <= error).all()


@pytest.mark.parametrize("case", CASES)
def test_sampled_factor_agrees_with_the_exact_one(case):
    model, x, name = CASES[case]()
    expected = reference.kronecker_factors(model, x, name)[1]
    optimizer = bare_kfac(model, fisher="mc", label_samples=3, factor_decay=0.0, inverse_interval=10**6)
    samples = []
    for _ in range(200):
        estimate(optimizer, model, x)
        samples.append(optimizer.curvature[name].output_factor.clone())
    mean, error = mean_and_error(samples)
    assert ((mean - expected).abs() <= error).all()
    assert samples[0].ne(samples[1]).any()


def test_more_labels_lower_the_variance_by_their_number_and_do_not_change_the_mean():
    """A Monte Carlo Fisher too small by the number of labels is a known mistake."""
    model, (x, _) = mlp(), data()
    traces = {}
    for labels in (1, 16):
        optimizer = bare_kfac(model, fisher="mc", label_samples=labels, factor_decay=0.0, inverse_interval=10**6)
        values = []
        for _ in range(300):
            estimate(optimizer, model, x)
            values.append(float(optimizer.curvature["2"].output_factor.trace()))
        traces[labels] = torch.tensor(values, dtype=DOUBLE)
        optimizer.detach()
    error = 4 * (traces[1].var() / 300 + traces[16].var() / 300).sqrt()
    assert (traces[1].mean() - traces[16].mean()).abs() <= error
    # the ratio of two sample variances of 300 draws has relative standard error 2 / sqrt(300) = 0.115
    assert 16 * (1 - 4 * 0.115) <= traces[1].var() / traces[16].var() <= 16 * (1 + 4 * 0.115)


@pytest.mark.parametrize("case", ["mlp", "convolution", "sequence", "twice"])
def test_exact_factors_are_deterministic_where_rows_depend_on_one_term(case):
    model, x, name = CASES[case]()
    optimizer = bare_kfac(model, factor_decay=0.0)
    estimate(optimizer, model, x)
    first = optimizer.curvature[name].output_factor.clone()
    estimate(optimizer, model, x)
    close(optimizer.curvature[name].output_factor, first)


def test_exact_factor_is_unbiased_where_terms_mix():
    """Every token's loss reaches every position: a random sign per term makes cross products vanish in expectation."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(torch.cumsum(torch.tanh(self.inner(x)), dim=1))

    torch.manual_seed(0)
    model, x = Mixing().to(DOUBLE), torch.randn(2, 3, 3, dtype=DOUBLE)
    expected = reference.kronecker_factors(model, x, "inner")[1]
    optimizer = bare_kfac(model, factor_decay=0.0, inverse_interval=10**6)
    samples = []
    for _ in range(400):
        estimate(optimizer, model, x)
        samples.append(optimizer.curvature["inner"].output_factor.clone())
    mean, error = mean_and_error(samples)
    assert ((mean - expected).abs() <= error).all()
    assert error.max() > 1e-6  # it is an estimate here


def test_exact_fisher_of_batch_norm_in_training_mode_is_unbiased():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh(), nn.Linear(3, 3)).to(DOUBLE)
    x, _ = data(4)
    # terms mix: E over signs of the row's outer product is the sum over terms of J^T H J of the whole batch
    handle_outputs: list[torch.Tensor] = []
    handle = model[0].register_forward_hook(lambda _m, _a, out: handle_outputs.append(out))
    logits = model(x)
    handle.remove()
    jacobian = torch.stack([torch.autograd.grad(f, handle_outputs, retain_graph=True)[0] for f in logits.reshape(-1)])
    hessian = torch.block_diag(*[reference.term_hessian("categorical", f.detach()) for f in logits])
    expected = torch.einsum("krc,kl,lrd->cd", jacobian, hessian, jacobian) / 4
    optimizer = bare_kfac(model, factor_decay=0.0, inverse_interval=10**6)
    samples = []
    for _ in range(400):
        estimate(optimizer, model, x)
        samples.append(optimizer.curvature["0"].output_factor.clone())
    mean, error = mean_and_error(samples)
    assert ((mean - expected).abs() <= error).all()


def example_nll(y: torch.Tensor):
    return lambda outputs, n: F.cross_entropy(outputs, y[n : n + 1])


def empirical(model, x, y, backward, passes=1, **options):
    optimizer = bare_kfac(model, fisher="empirical", **options)
    optimizer.zero_grad()
    for part_x, part_y in zip(x.chunk(passes), y.chunk(passes)):
        backward(model(part_x), part_y)
    optimizer.step()
    return optimizer


def test_empirical_factors_are_those_of_the_data_labels():
    model, (x, y) = mlp(), data()
    expected = reference.empirical_factors(model, x, "0", example_nll(y))
    optimizer = empirical(model, x, y, lambda f, t: F.cross_entropy(f, t).backward())
    close(optimizer.curvature["0"].input_factor, expected[0])
    close(optimizer.curvature["0"].output_factor, expected[1])


@pytest.mark.parametrize(
    ("backward", "passes"),
    [
        (lambda f, t: (1024.0 * F.cross_entropy(f, t)).backward(), 1),
        (lambda f, t: (F.cross_entropy(f, t) / 4).backward(), 4),
    ],
    ids=["loss scale", "accumulation"],
)
def test_empirical_fisher_does_not_see_loss_scale_or_accumulation(backward, passes):
    model, (x, y) = mlp(), data()
    expected = reference.empirical_factors(model, x, "0", example_nll(y))
    optimizer = empirical(model, x, y, backward, passes)
    close(optimizer.curvature["0"].input_factor, expected[0])
    close(optimizer.curvature["0"].output_factor, expected[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reduction_decides_for_a_gaussian(reduction):
    model, (x, _) = mlp(), data()
    target = torch.randn(8, 3, dtype=DOUBLE)
    expected = reference.empirical_factors(model, x, "0", lambda f, n: 0.5 * (f - target[n : n + 1]).square().sum())

    def backward(f: torch.Tensor, t: torch.Tensor) -> None:
        total = 0.5 * (f - t).square().sum()
        (total / len(f) if reduction == "mean" else total).backward()

    optimizer = empirical(model, x, target, backward, likelihood="gaussian", loss_reduction=reduction)
    close(optimizer.curvature["0"].output_factor, expected[1])


def test_empirical_pass_without_a_backward_is_ignored():
    model, (x, y) = mlp(), data()
    expected = reference.empirical_factors(model, x, "0", example_nll(y))
    optimizer = bare_kfac(model, fisher="empirical")
    model(100 * x)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    close(optimizer.curvature["0"].input_factor, expected[0])
    close(optimizer.curvature["0"].output_factor, expected[1])


def test_empirical_diagonal_is_the_squared_summed_gradient():
    model, (x, y) = mlp(), data()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)
    optimizer = empirical(model, x, y, lambda f, t: F.cross_entropy(f, t).backward(), curvature="diagonal")
    close(optimizer.curvature["0.weight"].diagonal, len(x) * g**2)


def test_empirical_and_sampled_fisher_differ():
    model, (x, y) = mlp(), data()
    exact = reference.kronecker_factors(model, x, "0")[1]
    optimizer = empirical(model, x, y, lambda f, t: F.cross_entropy(f, t).backward())
    assert (optimizer.curvature["0"].output_factor - exact).abs().max() > 0.1 * exact.abs().max()


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_true_fisher_never_sees_how_the_user_scales_the_loss(fisher, factor):
    model, (x, y) = mlp(), data()
    blocks = []
    for scale in (1.0, factor):
        optimizer = bare_kfac(model, fisher=fisher)
        (scale * F.cross_entropy(model(x), y, reduction="sum")).backward()
        optimizer.step()
        blocks.append(optimizer.curvature["0"].to_dense().clone())
        optimizer.detach()
        model.zero_grad()
    assert torch.equal(*blocks)
