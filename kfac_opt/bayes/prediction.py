"""Predictions of an ensemble drawn from a posterior, and where their uncertainty comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from kfac_opt._capture.outputs import pick_logits
from kfac_opt.bayes.posterior import Posterior, add_noise, erase_weights_, parameters_of, restored_weights, write_draw_
from kfac_opt.bayes.running import RunningPrediction, entropy
from kfac_opt.likelihoods import Likelihood, LikelihoodName, make_likelihood

Inputs = Tensor | Mapping[str, Any] | Iterable[Any]
Outputs = Callable[[Any], Any]

# One CPU thread, LeNet5 and small MLPs: up to this batch size the loop's overhead per call is larger than what
# batched matrix products lose (benchmarks.kfac_vi_time prints both).
VMAP_MAX_BATCH = 16
VMAP_CHUNK = 16
DRAWS_AHEAD, DRAWS_AHEAD_BYTES = 8, 2**26


@dataclass(frozen=True)
class Prediction:
    r"""The predictive distribution: the mean over weight samples of the distributions that each sample predicts.

    Attributes:
        probabilities: mean of the *probabilities* (never of the logits), the shape of the model's outputs:
            ``[batch, classes]``. For a Gaussian likelihood the mean of the outputs.
        entropy: of the mean prediction, in nats, without the class dimension: ``[batch]``. The total uncertainty.
            For a Gaussian likelihood that of the Gaussian with the mixture's variance, an upper bound.
        expected_entropy: mean entropy of the single predictions: the uncertainty that no data about the weights
            would remove.
        variance: over samples, of the probabilities (or of a Gaussian's outputs, noise not included).
        samples: single predictions ``[num_samples, batch, classes]`` if they were asked for, else None.
    """

    probabilities: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    variance: Tensor
    samples: Tensor | None = None

    @property
    def mutual_information(self) -> Tensor:
        """``entropy - expected_entropy``: between label and weights, what the ensemble disagrees about (nats)."""
        return self.entropy - self.expected_entropy


def predict(
    model: nn.Module,
    posterior: Posterior,
    x: Inputs,
    num_samples: int = 50,
    generator: torch.Generator | None = None,
    vectorize: Literal["auto", "loop", "vmap"] = "auto",
    *,
    antithetic: bool = False,
    keep_samples: bool = False,
    outputs: Outputs | None = None,
) -> Prediction:
    """Ensemble prediction: the mean of the probabilities over ``num_samples`` draws of the weights.

    The model stays in its mode (call ``model.eval()`` first, as for any prediction), nothing is recorded for
    autograd, and the weights are afterwards bit for bit what they were, also when the model raises. Memory does
    not grow with ``num_samples`` unless ``keep_samples``.

    Args:
        model: the model that the posterior was made from, or another one of the same structure.
        x: a tensor of inputs, a mapping of keyword arguments, or a loader: an iterable of such inputs or of
            ``(inputs, targets)`` pairs, read once, in whatever order it yields. Every batch of a loader sees the
            same draws, so that the result is that of all inputs at once.
        num_samples: number of draws; one ``posterior.sample(generator)`` each, in order.
        generator: of the draws; None: the posterior's own, which goes on from call to call.
        vectorize: ``"loop"`` runs one draw after the other, ``"vmap"`` up to 16 at once (``torch.func``),
            ``"auto"`` picks ``"vmap"`` for batches of at most 16 examples, and falls back to the loop
            for models that ``vmap`` cannot run, or whose weights it cannot replace. The draws are the same.
        antithetic: draws 2i and 2i + 1 are ``μ ± ε``, with the noise of draw i of the posterior; an odd last draw stands
            alone. Half the price of the draws, and errors odd in the noise cancel; not the default because
            the single draws are then not independent.
        keep_samples: also return every single prediction.
        outputs: picks the logits from what the model returns; a tensor or an object with ``.logits`` needs none.

    Returns:
        A :class:`Prediction` with the examples in the order of ``x``, on the device of the model's outputs.

    Raises:
        ValueError: for a posterior of another model (naming parameters and shapes), ``num_samples`` below 1, or a
            loader without batches.
        TypeError: for a generator that is none.

    >>> from kfac_opt.bayes.posterior import Width
    >>> model = nn.Linear(2, 3)
    >>> posterior = Posterior.from_model(model, [], width=Width(ess=100.0, prior_precision=100.0))
    >>> predict(model, posterior, torch.zeros(5, 2), num_samples=10).probabilities.shape
    torch.Size([5, 3])
    """
    if not isinstance(num_samples, Integral) or num_samples < 1:
        raise ValueError(f"predict: num_samples must be an integer >= 1, got {num_samples}")
    if vectorize not in ("auto", "loop", "vmap"):
        raise ValueError(f"predict: vectorize must be 'auto', 'loop' or 'vmap', got {vectorize!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"predict: generator must be a torch.Generator or None, got {generator!r}. For a seed pass "
            "generator=torch.Generator().manual_seed(...)."
        )
    parameters = parameters_of(model, posterior.shapes, posterior.fixed)
    generator = posterior.generator if generator is None else generator
    start = generator.get_state()
    parts: list[Prediction] = []
    with torch.no_grad(), restored_weights(parameters):
        for inputs in batches_of(x):
            generator.set_state(start)
            ensemble = _Ensemble(model, posterior, parameters, inputs, num_samples, generator, outputs, antithetic)
            parts.append(summarize(ensemble.outputs(vectorize), posterior.likelihood, num_samples, keep_samples))
    if not parts:
        raise ValueError("predict: the loader has no batches. Give at least one, or a tensor of inputs.")
    return parts[0] if len(parts) == 1 else concatenated(parts)


def batches_of(x: Inputs) -> Iterator[Any]:
    """The inputs of every batch, targets left out."""
    if isinstance(x, (Tensor, Mapping)):
        yield x
        return
    for item in x:
        yield item[0] if isinstance(item, (tuple, list)) else item


@dataclass(frozen=True)
class _Ensemble:
    """One batch seen by the draws of one prediction."""

    model: nn.Module
    posterior: Posterior
    parameters: Sequence[nn.Parameter]
    inputs: Any
    num_samples: int
    generator: torch.Generator
    pick: Outputs | None
    antithetic: bool

    def outputs(self, vectorize: str) -> Iterator[Tensor]:
        """The model's outputs for one draw after the other."""
        if vectorize == "loop" or (vectorize == "auto" and not self._suits_vmap()):
            yield from self._loop(self.num_samples)
            return
        left = self.num_samples
        while left > 0:
            state, size = self.generator.get_state(), min(left, VMAP_CHUNK)
            try:
                chunk = self._vmap(size)
            except (RuntimeError, ValueError, NotImplementedError):
                if vectorize == "vmap":
                    raise
                self.generator.set_state(state)
                yield from self._loop(left)
                return
            yield from chunk
            left -= size

    def _suits_vmap(self) -> bool:
        # In training mode batch norm writes its statistics in place, and dropout draws numbers: one draw at a time.
        return not self.model.training and _batch_size(self.inputs) <= VMAP_MAX_BATCH

    def _loop(self, number: int) -> Iterator[Tensor]:
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)
        means = list(self.posterior.mean.values())
        ahead = max(1, min(DRAWS_AHEAD, DRAWS_AHEAD_BYTES // size)) * (2 if self.antithetic else 1)
        for start in range(0, number, ahead):
            # A few at a time: the eigenbases are then read from the cache, which every forward empties.
            for noise, sign in self._noise(min(ahead, number - start)):
                write_draw_(self.parameters, means, [noise[name] for name in self.posterior.mean], sign)
                yield self._logits(_call(self.model, self.inputs))

    def _noise(self, number: int) -> list[tuple[dict[str, Tensor], float]]:
        """Deviations from the mean of the next ``number`` draws, an even one except at the end, each with its sign."""
        if not self.antithetic:
            return [(noise, 1.0) for noise in self.posterior.deviations(number, self.generator)]
        pairs = self.posterior.deviations((number + 1) // 2, self.generator)
        return [(noise, sign) for noise in pairs for sign in (1.0, -1.0)][:number]

    def _vmap(self, number: int) -> Tensor:
        """``[number, ...]``: outputs of ``number`` draws at once."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        draws = self._noise(number)
        stacked = {
            names[id(parameter)]: add_noise(mean, torch.stack([sign * noise[name] for noise, sign in draws]))
            for parameter, (name, mean) in zip(self.parameters, self.posterior.mean.items())
        }

        def run(weights: dict[str, Tensor]) -> Tensor:
            args, kwargs = ((), self.inputs) if isinstance(self.inputs, Mapping) else ((self.inputs,), {})
            return self._logits(functional_call(self.model, weights, args, dict(kwargs)))

        erase_weights_(self.parameters)
        result: Tensor = vmap(run, randomness="different")(stacked)
        if bool(result.isnan().any()):
            raise RuntimeError(
                "predict: vectorize='vmap' gives outputs that are not numbers: an input is none, a draw overflows, or the model "
                "reads a weight that it keeps outside its parameters as well (in a list, in a closure). Use vectorize='loop'."
            )
        return result

    def _logits(self, result: Any) -> Tensor:
        logits, _ = pick_logits(result, self.pick)
        self.posterior.likelihood.check(logits)
        return logits


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _batch_size(inputs: Any) -> int:
    tensors = [v for v in inputs.values() if isinstance(v, Tensor)] if isinstance(inputs, Mapping) else [inputs]
    return max((len(tensor) for tensor in tensors if tensor.dim() > 0), default=1)


def summarize(stream: Iterable[Tensor], likelihood: Likelihood, num_samples: int, keep_samples: bool) -> Prediction:
    """Mean, variance and mean entropy of the predictions in ``stream``, the model's outputs for each draw."""
    running = RunningPrediction(likelihood, keep=keep_samples)
    running.add(stream)
    variance = running.squares / num_samples
    return Prediction(
        probabilities=running.mean,
        entropy=entropy(likelihood, running.mean, variance),
        expected_entropy=running.expected_entropy / num_samples,
        variance=variance,
        samples=torch.cat(running.kept) if keep_samples else None,
    )


def mixture(
    predictions: Sequence[Prediction], likelihood: LikelihoodName | Likelihood | dict[str, object] = "categorical"
) -> Prediction:
    r"""Several ensembles as one: nets trained from different starts, each with its own posterior.

    The predictive of a mixture of Gaussians, one around each mode (Wilson & Izmailov, "Bayesian Deep Learning and a
    Probabilistic Perspective of Generalization", 2020), every ensemble with the same weight. Each net predicts with its own
    buffers, so that batch norm needs no care.

    Args:
        predictions: of the same inputs, in the same order.
        likelihood: of the models; only the entropy of the mixture depends on it.

    Returns:
        Means of the probabilities and of the expected entropies; the entropy of the mean; the variance over all
        draws, within and between the ensembles: :math:`\overline{\sigma_k^2} + \overline{(p_k - \bar p)^2}`;
        the draws one ensemble after the other if all of them kept theirs.

    Raises:
        ValueError: for no prediction, or for predictions of different shapes.

    >>> one, two = (Prediction(p, *torch.zeros(2, 1), torch.zeros(1, 2)) for p in torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    >>> mixture([one, two]).mutual_information
    tensor([0.6931])
    """
    if not predictions:
        raise ValueError("mixture: got no prediction. Give one Prediction for each net.")
    shapes = [tuple(prediction.probabilities.shape) for prediction in predictions]
    if len(set(shapes)) > 1:
        raise ValueError(f"mixture: the predictions have shapes {shapes}; they must be of the same inputs and classes.")
    each = torch.stack([prediction.probabilities for prediction in predictions])
    mean = each.mean(0)
    within = torch.stack([prediction.variance for prediction in predictions]).mean(0)
    variance = within + (each - mean).square().mean(0)
    kept = [prediction.samples for prediction in predictions if prediction.samples is not None]
    return Prediction(
        probabilities=mean,
        entropy=entropy(make_likelihood(likelihood), mean, variance),
        expected_entropy=torch.stack([prediction.expected_entropy for prediction in predictions]).mean(0),
        variance=variance,
        samples=torch.cat(kept) if len(kept) == len(predictions) else None,
    )


def concatenated(parts: Sequence[Prediction]) -> Prediction:
    """Predictions of several batches as those of one."""
    samples = [part.samples for part in parts if part.samples is not None]
    return Prediction(
        probabilities=torch.cat([part.probabilities for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        expected_entropy=torch.cat([part.expected_entropy for part in parts]),
        variance=torch.cat([part.variance for part in parts]),
        samples=torch.cat(samples, dim=1) if samples else None,
    )
