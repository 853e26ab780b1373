"""The Gaussian itself, against dense matrices and torch.distributions, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from kfac_opt._curvature.spectral import SpectralForm
from kfac_opt.bayes.posterior import Posterior, PosteriorBlock, Width
from kfac_opt.layers.layout import MatrixLayout
from tests.posterior.helpers import WIDTH, dense_covariance, flat, kronecker_block, noise_map, small_posterior, spd
from tests.support import assert_same, close


def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return spd(4, generator), spd(3, generator)


def dense_draw_covariance(block: PosteriorBlock) -> Tensor:
    noise = noise_map(block)
    return noise @ noise.T


def expected_covariance(input_factor: Tensor, output_factor: Tensor) -> Tensor:
    """Row-major: ``(G ⊗ A + d I)⁻¹ / ess``, from a dense inverse."""
    fisher = torch.kron(output_factor, input_factor)
    d = WIDTH.prior_precision / WIDTH.ess + WIDTH.floor
    return torch.linalg.inv(fisher + d * torch.eye(len(fisher), dtype=torch.float64)) / WIDTH.ess


def test_covariance_of_a_draw_is_the_damped_inverse_of_a_non_diagonal_kronecker_product():
    input_factor, output_factor = factors()
    close(
        dense_draw_covariance(kronecker_block(input_factor, output_factor)),
        expected_covariance(input_factor, output_factor),
    )


def cholesky_sampler(block: PosteriorBlock, place: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Covariance of ``place(L_G, E, L_A)`` with Cholesky factors of the damped inverses of a factored block."""
    input_factor, output_factor = factors()
    d = WIDTH.prior_precision / WIDTH.ess + WIDTH.floor
    pi = math.sqrt(input_factor.diagonal().mean() / output_factor.diagonal().mean())
    eye = torch.eye(4, dtype=torch.float64)
    left = torch.linalg.cholesky(torch.linalg.inv(output_factor + math.sqrt(d) / pi * eye[:3, :3]))
    right = torch.linalg.cholesky(torch.linalg.inv(input_factor + math.sqrt(d) * pi * eye))
    units = torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)
    noise = torch.stack([place(left, unit, right).reshape(-1) for unit in units], dim=1) / math.sqrt(WIDTH.ess)
    return noise @ noise.T


def test_factored_covariance_is_that_of_two_cholesky_factors_and_a_misplaced_one_fails():
    block = kronecker_block(*factors(), damping="factored")
    ours = dense_draw_covariance(block)
    close(ours, cholesky_sampler(block, lambda left, noise, right: left @ noise @ right.T))
    for wrong in (
        lambda left, noise, right: left.T @ noise @ right.T,
        lambda left, noise, right: left @ noise @ right,
        lambda left, noise, right: left.T @ noise @ right,
    ):
        with pytest.raises(AssertionError):
            close(ours, cholesky_sampler(block, wrong), rtol=1e-2)


def test_factored_damping_is_too_narrow_where_neither_factor_determines_the_weight():
    exact, factored = (kronecker_block(*factors(), damping=damping).spectrum for damping in ("exact", "factored"))
    assert bool((factored < exact).all())
    assert float((exact / factored).max()) > 2


def test_moments_of_many_draws_are_mean_and_dense_covariance():
    posterior = small_posterior()
    number = 20_000
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([flat(posterior.sample(generator)) for _ in range(number)])
    covariance = dense_covariance(posterior)
    scale = covariance.diagonal().sqrt()
    # Standard errors of a mean and of a second moment of Gaussians; 4.5 of them for 13 + 91 comparisons.
    assert bool(((draws.mean(0) - flat(posterior.mean)).abs() < 4.5 * scale / number**0.5).all())
    deviation = draws - flat(posterior.mean)
    error = ((covariance**2 + torch.outer(scale, scale) ** 2) / number).sqrt()
    assert bool(((deviation.T @ deviation / number - covariance).abs() < 4.5 * error).all())


def test_variance_is_the_diagonal_of_the_dense_covariance():
    posterior = small_posterior()
    assert {name: tuple(v.shape) for name, v in posterior.variance().items()} == {
        name: tuple(shape) for name, shape in posterior.shapes.items()
    }
    close(flat(posterior.variance()), dense_covariance(posterior).diagonal())


def test_log_prob_entropy_and_kl_equal_those_of_torch_distributions():
    posterior = small_posterior()
    mean, covariance = flat(posterior.mean), dense_covariance(posterior)
    dense = MultivariateNormal(mean, covariance)
    sample = posterior.sample()
    close(posterior.log_prob(sample), dense.log_prob(flat(sample)))
    close(posterior.entropy(), dense.entropy())
    prior = MultivariateNormal(torch.zeros_like(mean), torch.eye(len(mean), dtype=torch.float64) / WIDTH.prior_precision)
    close(posterior.kl(), kl_divergence(dense, prior))
    assert posterior.kl().dim() == posterior.log_prob(sample).dim() == posterior.entropy().dim() == 0


def test_kl_follows_a_prior_that_differs_between_blocks():
    narrow, wide = Width(10.0, 50.0), Width(10.0, 0.5)
    posterior = small_posterior()
    widths = {block.weight: narrow if block.weight == "scale" else wide for block in posterior.blocks}
    posterior = posterior.with_width(widths)
    precision = torch.cat(
        [torch.full((mean.numel(),), 50.0 if name == "scale" else 0.5) for name, mean in posterior.mean.items()]
    )
    dense = MultivariateNormal(flat(posterior.mean), dense_covariance(posterior))
    prior = MultivariateNormal(torch.zeros(len(precision), dtype=torch.float64), torch.diag(1 / precision.double()))
    close(posterior.kl(), kl_divergence(dense, prior))
    with pytest.raises(ValueError, match="different widths"):
        _ = posterior.width


def test_log_prob_is_differentiable():
    posterior = small_posterior()
    sample = {name: value.requires_grad_() for name, value in posterior.sample().items()}
    posterior.log_prob(sample).backward()
    gradient = flat({name: value.grad for name, value in sample.items()})
    difference = (flat(sample) - flat(posterior.mean)).detach()
    close(gradient, -torch.linalg.solve(dense_covariance(posterior), difference), rtol=1e-9)


def test_parameters_without_curvature_have_the_variance_of_the_prior():
    model = nn.Linear(3, 2, dtype=torch.float64)
    posterior = Posterior.from_model(model, [], width=Width(ess=100.0, prior_precision=4.0))
    close(flat(posterior.variance()), torch.full((8,), 0.25, dtype=torch.float64))
    mean = flat(posterior.mean)
    close(posterior.kl(), 2.0 * mean.square().sum())


def test_frozen_parameters_are_not_part_of_the_posterior():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    posterior = Posterior.from_model(model, [], width=WIDTH)
    assert list(posterior.mean) == ["1.weight", "1.bias"]
    assert posterior.fixed == ("0.weight", "0.bias")


def test_means_are_copies_and_draws_keep_order_shape_and_dtype():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    posterior = Posterior.from_model(model, [], width=WIDTH)
    before = posterior.mean["weight"].clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(posterior.mean["weight"], before)
    sample = posterior.sample()
    assert list(sample) == ["weight", "bias"]
    assert all(value.dtype == torch.bfloat16 and not value.requires_grad for value in sample.values())


def test_own_generator_advances_and_a_given_one_decides_alone():
    posterior, twin = small_posterior(), small_posterior()
    first, second = posterior.sample(), posterior.sample()
    assert not torch.equal(first["scale"], second["scale"])
    assert_same(first, twin.sample())
    given = [posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2)]
    assert_same(given[0], given[1])
    assert_same(posterior.sample(), [twin.sample() for _ in range(2)][1])


def test_sampling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    small_posterior().sample()
    assert torch.equal(torch.get_rng_state(), before)


def test_saved_posterior_loads_without_code_and_draws_the_same(tmp_path):
    posterior = small_posterior(damping="factored")
    posterior.save(tmp_path / "posterior.pt")
    torch.load(tmp_path / "posterior.pt", weights_only=True)
    loaded = Posterior.load(tmp_path / "posterior.pt")
    assert_same(loaded.mean, posterior.mean)
    assert_same(loaded.sample(), posterior.sample())
    assert_same(loaded.variance(), posterior.variance())
    assert_same(loaded.state_dict(), posterior.state_dict())
    assert torch.equal(loaded.kl(), posterior.kl())


def test_loading_something_else_says_what_was_found():
    with pytest.raises(ValueError, match=r"format 1.*\['weight'\].*posterior.save"):
        Posterior.from_state_dict({"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"lacks \['blocks', 'fixed', .*\], found \['format', 'mean'\]. Give"):
        Posterior.from_state_dict({"format": 1, "mean": {}})


def test_moving_keeps_everything():
    posterior = small_posterior()
    assert_same(posterior.to("cpu").state_dict(), posterior.state_dict())


@pytest.mark.gpu
def test_draws_on_a_gpu_from_a_cpu_generator_equal_those_on_the_cpu():
    posterior = small_posterior()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    here, there = posterior.sample(generators[0]), posterior.to("cuda").sample(generators[1])
    for name, value in here.items():
        close(there[name].cpu(), value)
    assert posterior.to("cuda").sample()["scale"].is_cuda


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ess": 0.0}, "ess must be finite and > 0, got 0.0"),
        ({"ess": float("nan")}, "ess must be finite"),
        ({"prior_precision": -1.0}, "prior_precision must be finite and > 0, got -1.0"),
        ({"floor": -0.1}, "floor must be finite and >= 0, got -0.1"),
    ],
)
def test_widths_out_of_range_are_refused(change: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Width(**{"ess": 1.0, **change})


def test_blocks_that_do_not_fit_the_means_are_refused():
    block = kronecker_block(*factors())
    good = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="a block covers 'weight', but no mean"):
        Posterior({"other": good}, [block])
    with pytest.raises(ValueError, match=r"mean of 'weight' has shape \[3, 5\], its block expects \[3, 4\]"):
        Posterior({"weight": torch.zeros(3, 5)}, [block])
    with pytest.raises(ValueError, match="'weight' has 2"):
        Posterior({"weight": good}, [block, block])
    with pytest.raises(ValueError, match="'other' has 0"):
        Posterior({"weight": good, "other": good}, [block])
    with pytest.raises(ValueError, match="no trainable parameters"):
        Posterior({}, [])
    layout = MatrixLayout("matrix", (3, 4))
    with pytest.raises(ValueError, match=r"eigenvalues of shape \[1, 2, 4\], its layout says \[1, 3, 4\]"):
        PosteriorBlock("weight", None, layout, SpectralForm(None, None, torch.zeros(1, 2, 4)), WIDTH)
    with pytest.raises(ValueError, match="Name the bias exactly when"):
        PosteriorBlock("weight", "bias", layout, SpectralForm(None, None, torch.zeros(1, 3, 4)), WIDTH)


def test_log_prob_names_what_is_wrong_with_a_sample():
    posterior = small_posterior()
    sample = posterior.sample()
    with pytest.raises(ValueError, match=r"lacks \['scale'\]"):
        posterior.log_prob({name: value for name, value in sample.items() if name != "scale"})
    with pytest.raises(ValueError, match=r"'scale' has shape \[3\], expected \[2\]"):
        posterior.log_prob({**sample, "scale": torch.zeros(3)})
