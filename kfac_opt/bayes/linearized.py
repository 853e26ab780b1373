r"""Predictions of the network linearised around the posterior's mean.

:math:`f(x, w) \approx f(x, \mu) + J(x)(w - \mu)` makes the outputs Gaussian, with covariance :math:`J \Sigma J^\top`
(Immer, Korzepa & Bauer 2021, arXiv:2008.08400). A Laplace posterior describes exactly this linear model, so it predicts
well through it and often badly through draws of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from kfac_opt._capture.outputs import pick_logits
from kfac_opt._capture.wrappers import unwrapped
from kfac_opt.bayes.posterior import Posterior, erase_weights_, parameters_of, restored_weights
from kfac_opt.bayes.prediction import Inputs, Prediction, batches_of, concatenated, summarize
from kfac_opt.likelihoods import Gaussian

CHUNK_ENTRIES = 2**25  # of Jacobians held at a time: 128 MB in single precision


@torch.no_grad()
def output_distribution(
    model: nn.Module, posterior: Posterior, x: Tensor | Mapping[str, Any], *, outputs: Callable[[Any], Any] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mean ``f(x, μ) [batch, outputs]`` and covariance :math:`J \Sigma J^\top` ``[batch, outputs, outputs]``.

    Args:
        model: in evaluation mode (a batch norm in training mode has no Jacobian per example).
        x: ``[batch, ...]``, or a mapping of keyword arguments: tensors ``[batch, ...]``, and values that all examples share.
        outputs: picks the logits from what the model returns.

    Jacobians are taken for many examples at once; of models that ``torch.func`` cannot run that way (LSTM and GRU), one
    row after the other.

    Raises:
        ValueError: for a posterior of another model, a model in training mode, no examples, or outputs that are not
            ``[batch, outputs]``.
    """
    if model.training:
        raise ValueError("linearized prediction: the model is in training mode. Call model.eval() first.")
    model = unwrapped(model)
    parameters = parameters_of(model, posterior.shapes, posterior.fixed)
    given = x if isinstance(x, Mapping) else {"": x}
    batch = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 0}
    if len({len(value) for value in batch.values()}) != 1 or not len(next(iter(batch.values()))):
        found = {name: list(value.shape) for name, value in batch.items()}
        raise ValueError(
            f"linearized prediction: got inputs {found or type(x).__name__}, expected tensors [batch, ...] of one batch."
        )
    shared = {name: value for name, value in given.items() if name not in batch}

    def logits(weights: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        rows = {name: value.unsqueeze(0) for name, value in example.items()}
        args, kwargs = ((), {**shared, **rows}) if isinstance(x, Mapping) else ((rows[""],), {})
        result, _ = pick_logits(functional_call(model, weights, args, kwargs), outputs)
        if result.dim() != 2:
            raise ValueError(
                f"linearized prediction: the model's output has shape {list(result.shape)}, expected [batch, outputs]."
            )
        return result.squeeze(0)

    with restored_weights(parameters):
        erase_weights_(parameters)
        first = logits(posterior.mean, {name: value[0] for name, value in batch.items()})
    if bool(first.isnan().any()):
        raise ValueError(
            "linearized prediction: the outputs are not numbers: those of the posterior's mean are not, or the model reads a "
            "weight that it keeps outside its parameters as well (in a list, in a closure). Read it off its module instead."
        )
    num_outputs = first.numel()
    chunk = max(1, CHUNK_ENTRIES // (num_outputs * posterior.num_parameters))
    parts = [dict(zip(batch, tensors)) for tensors in zip(*[value.split(chunk) for value in batch.values()])]
    means, covariances = [], []
    for part in parts:
        rows, values = _jacobians(logits, posterior.mean, part)
        means.append(values)
        covariances.append(_covariance(posterior, rows))
    return torch.cat(means), torch.cat(covariances)


def _jacobians(
    logits: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor], weights: dict[str, Tensor], batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Of the outputs of every example in the weights, ``[batch, outputs, *parameter.shape]``, and the outputs."""

    def with_value(weights: dict[str, Tensor], example: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value = logits(weights, example)
        return value, value

    try:
        found: tuple[dict[str, Tensor], Tensor] = vmap(jacrev(with_value, has_aux=True), in_dims=(None, 0))(weights, batch)
    except (RuntimeError, NotImplementedError) as error:
        try:
            return _jacobians_one_by_one(logits, weights, batch)
        except (RuntimeError, NotImplementedError):
            raise error from None
    return found


@torch.enable_grad()
def _jacobians_one_by_one(
    logits: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor], weights: dict[str, Tensor], batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    values, jacobians = [], []
    for index in range(len(next(iter(batch.values())))):
        value = logits(leaves, {name: tensor[index] for name, tensor in batch.items()})
        rows = [
            torch.autograd.grad(entry, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
            for entry in value.unbind()
        ]
        values.append(value.detach())
        jacobians.append([torch.stack(row) for row in zip(*rows)])
    return {name: torch.stack(parts) for name, parts in zip(leaves, zip(*jacobians))}, torch.stack(values)


def _covariance(posterior: Posterior, jacobian: dict[str, Tensor]) -> Tensor:
    """``J Σ Jᵀ [batch, outputs, outputs]`` block by block, from Jacobians ``[batch, outputs, *parameter.shape]``."""
    total: Tensor | None = None
    for block in posterior.blocks:
        to_matrix = vmap(vmap(block.layout.to_matrix))
        matrices = to_matrix(*[jacobian[name] for name in block.names]).to(block.deviation.dtype)
        rows = (block.form.rotate(matrices) * block.deviation).flatten(2)
        part = rows @ rows.mT
        total = part if total is None else total + part
    assert total is not None
    return total


@torch.no_grad()
def linearized_predict(
    model: nn.Module,
    posterior: Posterior,
    x: Inputs,
    num_samples: int = 200,
    generator: torch.Generator | None = None,
    *,
    keep_samples: bool = False,
    outputs: Callable[[Any], Any] | None = None,
) -> Prediction:
    """Predictive of the linearised network: the mean of the probabilities over draws of the *outputs*.

    Exact for a Gaussian likelihood (no draws); for the others ``num_samples`` draws from the Gaussian over the
    logits, which cost next to nothing once the Jacobian is there.

    Args:
        x: a tensor ``[batch, ...]``, a mapping of keyword arguments, or a loader of such inputs or ``(inputs, targets)`` pairs.
        generator: of the draws; None: the posterior's own.
        keep_samples: also return every single prediction.

    Raises:
        ValueError: as :func:`output_distribution`, or for ``num_samples`` below 1.

    >>> from kfac_opt.bayes.laplace import fit_laplace
    >>> model = nn.Linear(2, 3).eval()
    >>> posterior = fit_laplace(model, [(torch.randn(10, 2), torch.randint(3, (10,)))])
    >>> linearized_predict(model, posterior, torch.zeros(5, 2)).probabilities.shape
    torch.Size([5, 3])
    """
    if num_samples < 1:
        raise ValueError(f"linearized_predict: num_samples must be >= 1, got {num_samples}")
    generator = posterior.generator if generator is None else generator
    likelihood, parts = posterior.likelihood, []
    for inputs in batches_of(x):
        mean, covariance = output_distribution(model, posterior, inputs, outputs=outputs)
        if isinstance(likelihood, Gaussian):
            parts.append(_gaussian(mean, covariance.diagonal(dim1=-2, dim2=-1), likelihood.variance))
            continue
        values, vectors = torch.linalg.eigh(covariance.double())
        root = (vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)).to(mean.dtype)
        shape = (num_samples, *mean.shape)
        noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=generator.device).to(mean.device)
        draws = mean + (root @ noise.unsqueeze(-1)).squeeze(-1)
        parts.append(summarize(draws, likelihood, num_samples, keep_samples))
    if not parts:
        raise ValueError("linearized_predict: the loader has no batches. Give at least one, or a tensor of inputs.")
    return parts[0] if len(parts) == 1 else concatenated(parts)


def _gaussian(mean: Tensor, variance: Tensor, noise: float) -> Prediction:
    entropy, expected = (
        0.5 * (2 * torch.pi * torch.e * total).log() for total in (variance + noise, torch.full_like(variance, noise))
    )
    return Prediction(probabilities=mean, entropy=entropy, expected_entropy=expected, variance=variance)
