"""KFACVI on Bayesian linear regression, where everything is known in closed form, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from kfac_opt import KFAC, KFACVI
from kfac_opt.likelihoods import Gaussian
from tests.posterior.helpers import dense_covariance, flat
from tests.posterior.test_linear_gaussian import IN, NOISE, OUT, PRIOR_VARIANCE, N, exact_posterior, problem
from tests.support import close


def linear() -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(IN, OUT, bias=False, dtype=torch.float64)


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (model(inputs) - targets).square().sum() / NOISE / len(inputs)


def variational(model: nn.Module, **options: Any) -> KFACVI:
    plain: dict[str, Any] = {
        "lr": 0.0,
        "momentum": 0.0,
        "damping": 0.0,
        "damping_scale": "absolute",
        "damping_style": "exact",
        "num_data": N,
        "prior_precision": 1 / PRIOR_VARIANCE,
        "posterior_floor": 0.0,
        "likelihood": Gaussian(NOISE),
        "fisher": "exact",
        "factor_interval": 1,
        "inverse_interval": 1,
        "ramp_steps": 0,
        "kl_clip": None,
        "max_relative_update": None,
        "factor_dtype": torch.float64,
    }
    return KFACVI(model, **{**plain, **options})


def one_step(model: nn.Module, optimizer: KFACVI, samples: int, lr: float) -> None:
    """One whole-data step with this learning rate."""
    inputs, targets = problem()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    for _ in optimizer.weight_samples(samples):
        loss(model, inputs, targets).backward()
    optimizer.step()


def test_posterior_covariance_is_exact():
    model = linear()
    optimizer = variational(model)
    one_step(model, optimizer, 1, 0.0)
    _, covariance = exact_posterior(*problem())
    close(dense_covariance(optimizer.posterior()), covariance)
    close(flat(optimizer.posterior().variance()), covariance.diagonal())


@pytest.mark.parametrize("change", [{"posterior_damping": "factored"}, {"fisher": "empirical"}])
def test_other_settings_miss_the_exact_covariance(change: dict[str, Any]):
    model = linear()
    optimizer = variational(model, **change)
    one_step(model, optimizer, 1, 0.0)
    _, covariance = exact_posterior(*problem())
    ours = flat(optimizer.posterior().variance())
    assert float((ours - covariance.diagonal()).abs().max()) > 0.1 * float(covariance.max())


def test_one_step_without_noise_lands_on_the_posterior_mean():
    model = linear()
    optimizer = variational(model)
    one_step(model, optimizer, 1, 1.0)  # no estimate yet: the pass runs at the mean, curvature comes before the step
    close(model.weight.detach(), exact_posterior(*problem())[0])


@pytest.mark.parametrize("prior_gradient", ["mean", "sample"])
def test_one_step_with_an_antithetic_pair_lands_on_the_posterior_mean(prior_gradient: str):
    model = linear()
    optimizer = variational(model, prior_gradient=prior_gradient)
    one_step(model, optimizer, 1, 0.0)
    one_step(model, optimizer, 2, 1.0)
    close(model.weight.detach(), exact_posterior(*problem())[0])


def test_one_sample_with_the_prior_gradient_at_the_sample_lands_off_by_the_noise():
    model = linear()
    optimizer = variational(model, prior_gradient="sample")
    one_step(model, optimizer, 1, 0.0)
    inputs, targets = problem()
    mean = model.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.zero_grad()
    for _ in optimizer.weight_samples(1):
        noise = model.weight.detach() - mean
        loss(model, inputs, targets).backward()
    optimizer.step()
    assert float(noise.abs().max()) > 1e-3
    close(model.weight.detach(), exact_posterior(inputs, targets)[0] - noise)


def test_one_sample_with_the_prior_gradient_at_the_mean_keeps_the_part_of_the_noise_that_the_data_see():
    model = linear()
    optimizer = variational(model)
    one_step(model, optimizer, 1, 0.0)
    inputs, targets = problem()
    mean = model.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.zero_grad()
    for _ in optimizer.weight_samples(1):
        noise = model.weight.detach() - mean
        loss(model, inputs, targets).backward()
    optimizer.step()
    fisher = inputs.T @ inputs / N / NOISE
    delta = 1 / (N * PRIOR_VARIANCE)
    seen = noise @ fisher @ torch.linalg.inv(fisher + delta * torch.eye(IN, dtype=torch.float64))
    close(model.weight.detach(), exact_posterior(inputs, targets)[0] - seen)


def test_drawn_weights_have_the_exact_covariance():
    model = linear()
    optimizer = variational(model)
    one_step(model, optimizer, 1, 0.0)
    _, covariance = exact_posterior(*problem())
    number = 4000
    mean = model.weight.detach().clone()
    draws = []
    for _ in optimizer.weight_samples(number):
        draws.append((model.weight.detach() - mean).reshape(-1).clone())
    noise = torch.stack(draws)[::2]  # the others are their negatives
    assert torch.equal(model.weight.detach(), mean)
    scale = covariance.diagonal()
    error = ((covariance**2 + torch.outer(scale, scale)) / len(noise)).sqrt()
    assert bool(((noise.T @ noise / len(noise) - covariance).abs() < 4.5 * error).all())


def test_evidence_lower_bound_at_the_optimum_is_the_log_evidence():
    model = linear()
    optimizer = variational(model)
    one_step(model, optimizer, 1, 1.0)
    inputs, targets = problem()
    posterior = optimizer.posterior()
    residual = (targets - inputs @ model.weight.detach().T).square().sum()
    spread = torch.kron(torch.eye(OUT, dtype=torch.float64), inputs.T @ inputs).mul(dense_covariance(posterior)).sum()
    expected = -0.5 * (residual + spread) / NOISE - 0.5 * N * OUT * math.log(2 * math.pi * NOISE)
    marginal = PRIOR_VARIANCE * inputs @ inputs.T + NOISE * torch.eye(N, dtype=torch.float64)
    zero = torch.zeros(N, dtype=torch.float64)
    evidence = sum(MultivariateNormal(zero, marginal).log_prob(targets[:, output]) for output in range(OUT))
    close(expected - posterior.kl(), evidence)


def test_temperature_and_floor_follow_their_formulas():
    model = linear()
    optimizer = variational(model, temperature=0.5, posterior_floor=0.2)
    one_step(model, optimizer, 1, 0.0)
    inputs, _ = problem()
    ess, delta = N / 0.5, 0.5 / (N * PRIOR_VARIANCE)
    fisher = torch.kron(torch.eye(OUT, dtype=torch.float64), inputs.T @ inputs / N / NOISE)
    expected = torch.linalg.inv(fisher + (delta + 0.2) * torch.eye(IN * OUT, dtype=torch.float64)) / ess
    close(dense_covariance(optimizer.posterior()), expected)
    optimizer.param_groups[0]["temperature"] = 0.25
    ess, delta = N / 0.25, 0.25 / (N * PRIOR_VARIANCE)
    expected = torch.linalg.inv(fisher + (delta + 0.2) * torch.eye(IN * OUT, dtype=torch.float64)) / ess
    close(dense_covariance(optimizer.posterior()), expected)


def test_step_damping_adds_delta_and_extra_damping():
    model = linear()
    optimizer = variational(model, damping=0.3)
    one_step(model, optimizer, 1, 0.0)
    start = model.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.5
    inputs, targets = problem()
    optimizer.zero_grad()
    loss(model, inputs, targets).backward()
    delta = 1 / (N * PRIOR_VARIANCE)
    gradient = model.weight.grad + delta * start
    fisher = inputs.T @ inputs / N / NOISE
    expected = start - 0.5 * gradient @ torch.linalg.inv(fisher + (delta + 0.3) * torch.eye(IN, dtype=torch.float64))
    optimizer.step()
    close(model.weight.detach(), expected)


def test_laplace_posterior_of_kfac_is_exact_at_any_damping():
    model = linear()
    inputs, targets = problem()
    optimizer = KFAC(model, lr=0.0, damping=7.0, likelihood=Gaussian(NOISE), fisher="exact", factor_dtype=torch.float64)
    loss(model, inputs, targets).backward()
    optimizer.step()
    posterior = optimizer.posterior(num_data=N, prior_precision=1 / PRIOR_VARIANCE)
    close(dense_covariance(posterior), exact_posterior(inputs, targets)[1])
    assert torch.equal(posterior.mean["weight"], model.weight)
    assert posterior.likelihood.describe() == {"name": "gaussian", "variance": NOISE}
    tempered = optimizer.posterior(num_data=N, prior_precision=2.0, temperature=0.1)
    fisher = torch.kron(torch.eye(OUT, dtype=torch.float64), inputs.T @ inputs / N / NOISE)
    expected = torch.linalg.inv(N * fisher / 0.1 + 2.0 * torch.eye(IN * OUT, dtype=torch.float64))
    close(dense_covariance(tempered), expected)
