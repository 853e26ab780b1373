"""Laplace after the training: whole-data factors, evidence, prior precision, linearised predictive."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from kfac_opt import KFAC
from kfac_opt.bayes.laplace import best_prior_precision, fit_laplace, log_marginal_likelihood
from kfac_opt.bayes.linearized import linearized_predict, output_distribution
from kfac_opt.bayes.posterior import Width
from kfac_opt.likelihoods import Gaussian
from tests import reference
from tests.posterior.helpers import dense_covariance, flat
from tests.posterior.test_linear_gaussian import IN, NOISE, OUT, PRIOR_VARIANCE, N, exact_posterior, problem
from tests.support import assert_same, close, data, gradients, mlp, weights


def batches(*tensors: Tensor, size: int = 3) -> list[tuple[Tensor, ...]]:
    return list(zip(*[tensor.split(size) for tensor in tensors]))


def regression() -> nn.Linear:
    model = nn.Linear(IN, OUT, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(exact_posterior(*problem())[0])
    return model


def laplace(model: nn.Module, loader: Any, **options: Any) -> Any:
    return fit_laplace(model, loader, **{"factor_dtype": torch.float64, **options})


# -- curvature over the whole data set ---------------------------------------------------------------------------


def test_factors_are_those_of_all_batches_together():
    model = mlp().eval()
    x, y = data(8)
    posterior = laplace(model, batches(x, y))  # the last batch is smaller
    assert posterior.num_data == 8
    for block, name in zip(posterior.blocks, ("0", "2")):
        input_factor, output_factor = reference.kronecker_factors(model, x, name)
        close(block.form.dense()[0], torch.kron(input_factor, output_factor))


def test_eigenbasis_scales_are_those_of_all_batches_together():
    model = mlp().eval()
    x, y = data(8)
    posterior = laplace(model, batches(x, y), curvature="eigenbasis")
    for block, name in zip(posterior.blocks, ("0", "2")):
        input_factor, _ = reference.kronecker_factors(model, x, name)
        per_example, terms = reference.per_example_fisher(model, x, name)
        form = block.form
        close(form.input_basis[0] @ torch.diag(torch.linalg.eigvalsh(input_factor)) @ form.input_basis[0].T, input_factor)
        scales = reference.eigenbasis_scales(per_example, terms, form.input_basis[0], form.output_basis[0])
        close(form.eigenvalues[0], scales, rtol=1e-8)


def test_the_model_its_gradients_and_an_attached_optimizer_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    optimizer = KFAC(model, factor_dtype=torch.float64, factor_interval=1)
    x, y = data(8)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.eval()
    before, state, grads = weights(model), {k: v.clone() for k, v in model.state_dict().items()}, gradients(model)
    factor, random = optimizer.curvature["0"].input_factor.clone(), torch.get_rng_state()
    first = laplace(model, batches(x, y))
    assert_same(weights(model), before)
    assert_same(dict(model.state_dict()), state)
    assert_same(gradients(model), grads)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(optimizer.curvature["0"].input_factor, factor)
    assert not model.training
    assert_same(laplace(model, batches(x, y)).state_dict(), first.state_dict())
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()  # the hooks are still there


def test_log_likelihood_is_that_of_the_data_with_constants():
    model = mlp().eval()
    x, y = data(8)
    expected = F.log_softmax(model(x), -1).gather(1, y[:, None]).sum()
    assert laplace(model, batches(x, y)).log_likelihood == pytest.approx(float(expected.detach()), rel=1e-12)
    inputs, targets = problem()
    line = regression()
    density = torch.distributions.Normal(line(inputs), NOISE**0.5).log_prob(targets).sum()
    found = laplace(line, batches(inputs, targets, size=7), likelihood=Gaussian(NOISE)).log_likelihood
    assert found == pytest.approx(float(density.detach()), rel=1e-12)


class Tokens(nn.Module):
    """Logits for each token, with a mask of what counts if there is one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 4).double(), nn.Linear(4, 5).double()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


@pytest.mark.parametrize("how", ["ignored", "masked", "both"])
def test_tokens_without_a_label_count_neither_in_the_likelihood_nor_in_the_curvature(how: str):
    model = Tokens().eval()
    tokens, labels = torch.randint(7, (6, 4)), torch.randint(5, (6, 4))
    mask = torch.arange(4).expand(6, 4) < torch.tensor([[1], [2], [4], [3], [1], [2]])
    expected = -F.cross_entropy(model(tokens)[mask], labels[mask], reduction="sum")
    given = labels if how == "masked" else labels.where(mask, -100)
    posterior = laplace(model, [(tokens, given)], outputs=None if how == "ignored" else lambda out: (out, mask))
    assert posterior.num_data == int(mask.sum())
    assert posterior.log_likelihood == pytest.approx(float(expected.detach()), rel=1e-12)
    each = laplace(model, [(tokens[mask].unsqueeze(1), labels[mask].unsqueeze(1))])
    for found, alone in zip(posterior.blocks, each.blocks):
        close(found.form.dense(), alone.form.dense())


def test_masked_regression_is_that_of_the_examples_that_count():
    inputs, targets = problem()
    mask = torch.arange(len(inputs)) % 3 > 0
    line = regression()
    found = laplace(line, [(inputs, targets)], likelihood=Gaussian(NOISE), outputs=lambda out: (out, mask))
    alone = laplace(line, [(inputs[mask], targets[mask])], likelihood=Gaussian(NOISE))
    assert (found.num_data, found.log_likelihood) == (alone.num_data, pytest.approx(alone.log_likelihood, rel=1e-12))


def test_soft_labels_and_images_have_the_likelihood_of_their_cross_entropy():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double().eval()
    x, hard, soft = torch.randn(4, 2, 3, 3).double(), torch.randint(3, (4, 3, 3)), torch.rand(4, 3, 3, 3).double().softmax(1)
    for y in (hard, soft):
        expected = -F.cross_entropy(model(x), y, reduction="sum")
        assert laplace(model, [(x, y)]).log_likelihood == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical"])
def test_targets_of_another_shape_are_refused_and_not_paired_with_every_output(likelihood: Any):
    model = nn.Linear(4, 3 if likelihood == "categorical" else 1).double().eval()
    y = torch.zeros(8, 1, dtype=torch.int64) if likelihood == "categorical" else torch.zeros(8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"fit_laplace: the targets are \[8"):
        laplace(model, [(data(8)[0], y)], likelihood=likelihood)


def test_some_parameters_alone():
    model = mlp().eval()
    posterior = laplace(model, batches(*data(8)), params=model[2].parameters())
    assert list(posterior.mean) == ["2.weight", "2.bias"]
    assert posterior.fixed == ("0.weight", "0.bias")


# -- evidence ----------------------------------------------------------------------------------------------------


def evidence(prior_variance: float) -> Tensor:
    inputs, targets = problem()
    marginal = prior_variance * inputs @ inputs.T + NOISE * torch.eye(N, dtype=torch.float64)
    zero = torch.zeros(N, dtype=torch.float64)
    return sum(MultivariateNormal(zero, marginal).log_prob(targets[:, output]) for output in range(OUT))


def test_log_marginal_likelihood_of_linear_regression_is_the_log_evidence():
    inputs, targets = problem()
    options = {"likelihood": Gaussian(NOISE), "prior_precision": 1 / PRIOR_VARIANCE}
    posterior = laplace(regression(), batches(inputs, targets, size=7), **options)
    close(dense_covariance(posterior), exact_posterior(inputs, targets)[1])
    close(log_marginal_likelihood(posterior), evidence(PRIOR_VARIANCE))
    close(log_marginal_likelihood(posterior, posterior.log_likelihood), log_marginal_likelihood(posterior))
    # The evidence lower bound at the optimum is the same number.
    model = regression()
    residual = (targets - model(inputs)).square().sum().detach()
    spread = torch.kron(torch.eye(OUT, dtype=torch.float64), inputs.T @ inputs).mul(dense_covariance(posterior)).sum()
    expected = -0.5 * (residual + spread) / NOISE - 0.5 * N * OUT * math.log(2 * math.pi * NOISE)
    close(expected - posterior.kl(), evidence(PRIOR_VARIANCE))


def test_best_prior_precision_is_the_maximum_over_a_grid():
    posterior = laplace(mlp().eval(), batches(*data(64), size=20), prior_precision=1.0)
    best = best_prior_precision(posterior)

    def value(precision: float) -> float:
        return float(log_marginal_likelihood(posterior.with_width(Width(posterior.width.ess, precision))))

    grid = [value(best * math.exp(offset)) for offset in (-3, -1, -0.1, -1e-3, 1e-3, 0.1, 1, 3)]
    assert all(value(best) >= other for other in grid)
    chosen = laplace(mlp().eval(), batches(*data(64), size=20), prior_precision="evidence")
    assert chosen.width.prior_precision == pytest.approx(best, rel=1e-9)
    layer = best_prior_precision(posterior, [posterior.blocks[0]])
    widths = {block.weight: Width(64, best) for block in posterior.blocks}
    apart = posterior.with_width({**widths, posterior.blocks[0].weight: Width(64, layer)})
    assert float(log_marginal_likelihood(apart)) > value(best)


def test_evidence_without_what_it_needs_is_explained():
    model = mlp()
    optimizer = KFAC(model)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="does not know the log-likelihood of its data"):
        log_marginal_likelihood(optimizer.posterior(8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="all means are zero"):
        best_prior_precision(optimizer.posterior(8))


# -- linearised predictive ---------------------------------------------------------------------------------------


def test_output_covariance_is_that_of_dense_jacobians():
    model = mlp().eval()
    x, y = data(8)
    posterior = laplace(model, batches(x, y), prior_precision=3.0)
    mean, covariance = output_distribution(model, posterior, x)
    jacobians = reference.parameter_jacobian(model, x, list(model.parameters()))
    dense = dense_covariance(posterior)
    close(mean, model(x).detach())
    for n, parts in enumerate(jacobians):
        rows = torch.cat([part.flatten(1) for part in parts], dim=1)
        close(covariance[n], rows @ dense @ rows.T)


def test_output_covariance_of_convolutions_norms_and_bare_parameters():
    from tests.posterior.test_kfac_vi import Everything

    torch.manual_seed(0)
    model = Everything().double().eval()
    tokens, y = torch.randint(7, (6, 5)), torch.randint(3, (6,))
    with pytest.warns(UserWarning, match="scale"):
        posterior = laplace(model, [(tokens, y)])
    _, covariance = output_distribution(model, posterior, tokens)
    dense = dense_covariance(posterior)
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(tokens[:1])[0]]
    jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    close(covariance[0], jacobian @ dense @ jacobian.T)


class Recurrent(nn.Module):
    """A network that ``torch.func`` cannot run for many examples at once; ``scale`` is the same for all examples."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.memory, self.head = kind(3, 4, batch_first=True).double(), nn.Linear(4, 3).double()  # type: ignore[call-arg]

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        out: Tensor = self.head(self.memory(x if shift is None else x + shift)[0][:, -1])
        return out * scale


@pytest.mark.filterwarnings("ignore:.*diagonal curvature")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_output_covariance_of_recurrent_layers_and_keyword_inputs(kind: type[nn.Module]):
    model = Recurrent(kind).eval()
    x, shift = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 3).double()
    posterior = laplace(model, [({"x": x, "shift": shift, "scale": 2.0}, torch.arange(5) % 3)])
    mean, covariance = output_distribution(model, posterior, {"x": x, "shift": shift, "scale": 2.0})
    close(mean, model(x, shift, 2.0).detach())
    dense, parameters = dense_covariance(posterior), list(model.parameters())
    for out, found in zip(model(x, shift, 2.0), covariance):
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in out]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        close(found, jacobian @ dense @ jacobian.T)
    assert linearized_predict(model, posterior, [({"x": x}, shift)], num_samples=3).probabilities.shape == (5, 3)


@pytest.mark.parametrize("x", [torch.zeros(0, 4).double(), {"input": torch.zeros(2, 4), "other": torch.zeros(3)}, {"input": 1}])
def test_linearised_prediction_without_a_batch_is_explained(x: Any):
    model = mlp().eval()
    posterior = laplace(model, [data()])
    with pytest.raises(ValueError, match=r"linearized prediction: got inputs .*expected tensors \[batch"):
        output_distribution(model, posterior, x)


def test_linearised_regression_is_the_exact_predictive():
    inputs, targets = problem()
    model = regression().eval()
    options = {"likelihood": Gaussian(NOISE), "prior_precision": 1 / PRIOR_VARIANCE}
    posterior = laplace(model, batches(inputs, targets, size=7), **options)
    prediction = linearized_predict(model, posterior, inputs)
    close(prediction.probabilities, model(inputs).detach())
    _, covariance = exact_posterior(inputs, targets)
    rows = covariance.view(OUT, IN, OUT, IN).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    expected = torch.einsum("ni,oij,nj->no", inputs, rows, inputs)
    close(prediction.variance, expected)
    close(prediction.entropy, torch.distributions.Normal(0.0, (expected + NOISE).sqrt()).entropy())


def test_linearised_classification_averages_softmax_over_the_gaussian_logits():
    model = mlp().eval()
    x, y = data(8)
    posterior = laplace(model, batches(x, y), prior_precision=5.0)
    mean, covariance = output_distribution(model, posterior, x)
    number = 20_000
    prediction = linearized_predict(model, posterior, x, number, torch.Generator().manual_seed(0), keep_samples=True)
    draws = MultivariateNormal(mean, covariance + 1e-12 * torch.eye(3)).sample((number,)).softmax(-1)
    error = ((draws.var(0) + prediction.variance) / number).sqrt()
    assert bool(((prediction.probabilities - draws.mean(0)).abs() < 4.5 * error).all())
    assert bool((prediction.mutual_information > 0).all())
    assert prediction.samples.shape == (number, 8, 3)
    # Less confident than the plug-in prediction.
    assert float(prediction.entropy.mean()) > float(torch.special.entr(model(x).softmax(-1)).sum(-1).mean())


def test_linearised_prediction_reads_loaders_and_refuses_what_it_cannot_do():
    model = mlp().eval()
    x, y = data(8)
    posterior = laplace(model, batches(x, y))
    prediction = linearized_predict(model, posterior, batches(x, y), 10)
    assert prediction.probabilities.shape == (8, 3)
    with pytest.raises(ValueError, match="the model is in training mode"):
        linearized_predict(model.train(), posterior, x)
    with pytest.raises(ValueError, match="another model"):
        linearized_predict(mlp(classes=4).eval(), posterior, x)
    with pytest.raises(ValueError, match="num_samples must be >= 1"):
        linearized_predict(model, posterior, x, 0)
    with pytest.raises(ValueError, match="no batches"):
        linearized_predict(model.eval(), posterior, [])
    with pytest.raises(ValueError, match=r"expected \[batch, outputs\]"):
        linearized_predict(model, posterior, x.reshape(2, 4, 4))


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "the loader has no batches"),
        ([torch.zeros(3, 4)], {}, r"expected pairs \(inputs, targets\)"),
        (None, {"prior_precision": 0.0}, "prior_precision must be > 0"),
        (None, {"temperature": -1.0}, "temperature must be > 0"),
    ],
)
def test_bad_arguments_of_the_fit_are_explained(loader: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        laplace(mlp(), batches(*data(8)) if loader is None else loader, **options)


def test_mean_is_the_model_and_variance_shrinks_with_data():
    model = mlp().eval()
    x, y = data(32)
    few, many = laplace(model, batches(x[:8], y[:8])), laplace(model, batches(x, y))
    assert torch.equal(flat(few.mean), flat(weights(model)))
    assert float(flat(many.variance()).sum()) < float(flat(few.variance()).sum())
