"""Oracles of Bayesian linear regression: posterior, Newton step and evidence are known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from kfac_opt.bayes.posterior import Posterior, Width
from tests.posterior.helpers import flat, kronecker_block, noise_map
from tests.support import close

NOISE = 0.3
PRIOR_VARIANCE = 0.7
N, IN, OUT = 30, 4, 3


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    inputs = torch.randn(N, IN, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    targets = inputs @ weight.T + NOISE**0.5 * torch.randn(N, OUT, generator=generator, dtype=torch.float64)
    return inputs, targets


def exact_posterior(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[out, in]`` and covariance of the row-major vec, from the normal equations."""
    precision = inputs.T @ inputs / NOISE + torch.eye(IN, dtype=torch.float64) / PRIOR_VARIANCE
    mean = torch.linalg.solve(precision, inputs.T @ targets / NOISE).T
    return mean, torch.kron(torch.eye(OUT, dtype=torch.float64), torch.linalg.inv(precision).contiguous())


def ours(mean: Tensor, damping: str = "exact") -> Posterior:
    inputs, _ = problem()
    width = Width(ess=N, prior_precision=1 / PRIOR_VARIANCE)
    block = kronecker_block(inputs.T @ inputs / N, torch.eye(OUT, dtype=torch.float64) / NOISE, width=width, damping=damping)
    return Posterior({"weight": mean}, [block], likelihood="gaussian")


def test_covariance_equals_the_exact_posterior_covariance():
    mean, covariance = exact_posterior(*problem())
    noise = noise_map(ours(mean).blocks[0])
    close(noise @ noise.T, covariance)


def test_factored_damping_misses_the_exact_covariance():
    mean, covariance = exact_posterior(*problem())
    noise = noise_map(ours(mean, "factored").blocks[0])
    assert float((noise @ noise.T - covariance).abs().max()) > 0.1 * float(covariance.abs().max())


def test_evidence_lower_bound_at_the_optimum_is_the_log_evidence():
    inputs, targets = problem()
    mean, covariance = exact_posterior(inputs, targets)
    posterior = ours(mean)
    residual = (targets - inputs @ mean.T).square().sum()
    spread = torch.kron(torch.eye(OUT, dtype=torch.float64), inputs.T @ inputs).mul(covariance).sum()
    expected = -0.5 * (residual + spread) / NOISE - 0.5 * N * OUT * math.log(2 * math.pi * NOISE)
    evidence = torch.zeros((), dtype=torch.float64)
    marginal = PRIOR_VARIANCE * inputs @ inputs.T + NOISE * torch.eye(N, dtype=torch.float64)
    for output in range(OUT):
        evidence += MultivariateNormal(torch.zeros(N, dtype=torch.float64), marginal).log_prob(targets[:, output])
    close(expected - posterior.kl(), evidence)


def test_log_prob_at_the_mean_is_that_of_the_dense_gaussian():
    mean, covariance = exact_posterior(*problem())
    posterior = ours(mean)
    close(
        posterior.log_prob(posterior.mean),
        MultivariateNormal(flat(posterior.mean), covariance).log_prob(mean.reshape(-1)),
    )
