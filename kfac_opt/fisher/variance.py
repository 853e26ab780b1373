r"""How far a Fisher matrix estimated from sampled labels is from the exact one (Soen & Sun 2021, arXiv:2107.04205).

With ``m`` labels :math:`y_k \sim p` of an input, Jacobian ``J [C, P]`` of its logits and all scores at once,
:math:`S = J - 1 (p^\top J)`:

- :math:`I_1 = \frac1m \sum_k s_k s_k^\top`, the outer products of the scores: what ``fisher="mc"`` averages;
- :math:`I_2 = J^\top H J + \sum_a (p_a - \bar t_a)\, \partial^2 h^a`, the Hessian of the loss with those labels.

Both have the mean ``F``. Nothing of size ``P × P`` is made: the Gram matrices :math:`S S'^\top` of the scores carry all
norms of ``I1``, the inner products of the Hessians of the logits those of ``I2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfac_opt.fisher.bounds import spectral_bounds
from kfac_opt.fisher.gradients import NETWORK
from kfac_opt.fisher.hessians import entrywise_second, hessian_inner_products
from kfac_opt.fisher.scores import ScoreSource, entrywise_first, first_moments
from kfac_opt.fisher.source import readable
from kfac_opt.likelihoods import Likelihood, LikelihoodName, make_likelihood

SecondMode = Literal["auto", "exact", "probes", "skip"]
PairMode = Literal["auto", "all", "sampled"]
ALL_PAIRS = 2000
"""Inputs up to which all pairs are taken by default: a quarter of a minute for a small net on one CPU thread."""
SAMPLED_TILES = 100
"""Pairs of chunks of inputs that are drawn beyond."""
EXACT_WORK = 300_000
"""Parameters × inputs × classes up to which ``I2`` is exact by default: some ten seconds on one CPU thread."""


@dataclass(frozen=True)
class SecondVariance:
    """Variance of ``I2``, the Hessian with sampled labels.

    Attributes:
        total_variance: sum of the variances of all entries.
        covariance_norm: Frobenius norm of the covariance of all entries.
        bound: ``(1/m) ‖∂²h‖_F² ‖H‖_F``, an upper bound of ``covariance_norm``.
        num_probes: None when exact; else the random vectors per block behind the estimate.
    """

    total_variance: float
    covariance_norm: float
    bound: float
    num_probes: int | None


@dataclass(frozen=True)
class PartVariance:
    """Variance of the estimators of one layer's diagonal block, or of the whole matrix (name ``"(network)"``).

    Attributes:
        name: of the module.
        total_variance: sum over all entries of ``Var(I1)``.
        covariance_norm: Frobenius norm of the covariance of all entries of ``I1``.
        bound: ``(1/m) ‖J‖_F⁴ ‖K − H ⊗ H‖_F``, an upper bound of ``covariance_norm``; K is the fourth central moment
            of the one-hot label.
        fisher_norm: ``‖F‖_F`` of the exact matrix, to compare with.
        num_labels: ``m``.
        second: the same for ``I2``, None when skipped.
        spectral_norm: largest singular value of the Jacobian of the logits in the layer, over the inputs.
        spectral_bound: its bound ``Π s_max(W_i⁻) ‖h̄_l‖`` from the weights of the layers above; None unless the model
            is a chain of layers with activations of slope at most one.
    """

    name: str
    total_variance: float
    covariance_norm: float
    bound: float
    fisher_norm: float
    num_labels: int
    second: SecondVariance | None
    spectral_norm: float
    spectral_bound: float | None

    def relative_error(self, label_samples: int = 1, factor_decay: float = 0.0) -> float:
        """Root of the mean squared Frobenius error of ``I1`` over ``‖F‖_F``, averaged as an optimizer does.

        Args:
            label_samples: labels per input and estimate.
            factor_decay: weight kept by the old average at every estimate.
        """
        single = self.total_variance * self.num_labels
        return math.sqrt(single / effective_labels(label_samples, factor_decay)) / self.fisher_norm

    def labels_for(self, relative_error: float) -> float:
        """Effective number of labels at which ``I1`` has this relative error."""
        if not relative_error > 0.0:
            raise ValueError(f"relative_error must be > 0, got {relative_error}")
        return self.total_variance * self.num_labels / (relative_error * self.fisher_norm) ** 2


@dataclass(frozen=True)
class EstimatorVariance(PartVariance):
    """Variance for the whole network, and in ``layers`` by module name; ``num_inputs`` inputs were given.

    ``sampled_pairs``: ``covariance_norm`` and ``fisher_norm`` come from a sample of the pairs of inputs.
    """

    layers: dict[str, PartVariance]
    num_inputs: int
    sampled_pairs: bool

    def describe(self, label_samples: int = 1, factor_decay: float = 0.95) -> str:
        """What these numbers mean for an optimizer's ``label_samples`` and ``factor_decay``, in sentences."""
        effective = effective_labels(label_samples, factor_decay)
        lines = [
            f"One estimate from {self.num_inputs} inputs with {label_samples} label(s) each has a relative error of "
            f"{self.relative_error(label_samples):.3g}; averaged with factor_decay={factor_decay:g} it is worth "
            f"{effective:.3g} labels per input: {self.relative_error(label_samples, factor_decay):.3g}."
        ]
        for name, layer in self.layers.items():
            needed = layer.labels_for(0.1)
            decay = decay_for(needed, label_samples)
            lines.append(
                f"'{name}': {layer.relative_error(label_samples):.3g} with one estimate, "
                f"{layer.relative_error(label_samples, factor_decay):.3g} averaged; 10 % needs {needed:.3g} labels per "
                f"input, that is factor_decay={decay:.4g} with label_samples={label_samples}."
            )
        return "\n".join(lines)


def effective_labels(label_samples: int, factor_decay: float) -> float:
    r"""Labels per input that an exponential average of estimates is worth: :math:`m \frac{1 + d}{1 - d}`.

    Estimates with independent labels and weights :math:`(1 - d) d^k` have the variance of one times
    :math:`(1 - d) / (1 + d)`. It holds for the noise of the labels, once the average has forgotten its start; the
    weights of the model must not move much meanwhile.
    """
    if label_samples < 1:
        raise ValueError(f"label_samples must be >= 1, got {label_samples}")
    if not 0.0 <= factor_decay < 1.0:
        raise ValueError(f"factor_decay must be in [0, 1), got {factor_decay}")
    return label_samples * (1.0 + factor_decay) / (1.0 - factor_decay)


def decay_for(labels: float, label_samples: int = 1) -> float:
    """The ``factor_decay`` that makes ``label_samples`` labels per estimate worth ``labels``; 0 if they already are."""
    ratio = labels / label_samples
    return max(0.0, (ratio - 1.0) / (ratio + 1.0))


def estimator_variance(
    model: nn.Module,
    inputs: Any,
    likelihood: LikelihoodName | Likelihood = "categorical",
    num_labels: int = 1,
    *,
    second: SecondMode = "auto",
    num_probes: int = 50,
    pairs: PairMode = "auto",
    generator: torch.Generator | None = None,
    memory_limit: int = 2 * 1024**3,
    outputs: Callable[[Any], Any] | None = None,
) -> EstimatorVariance:
    r"""Variance of the two estimators of the Fisher matrix, for the network and by layer.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> found = estimator_variance(model, torch.randn(8, 4), num_labels=2)
    >>> found.covariance_norm <= found.bound, found.layers["0"].second.total_variance < 1e-9
    (True, True)

    Of several inputs: the covariance of the mean estimator given the inputs,
    :math:`\frac{1}{N^2} \sum_n \mathrm{Cov}_n / m`. Its norm needs the scores of every pair of inputs; the total
    variance only those of each input.

    Args:
        model: in evaluation mode where it has batch normalization or dropout.
        inputs: a tensor, a pair (targets are not read) or a loader.
        likelihood: ``"categorical"`` with one label per input, or ``"bernoulli"`` with one output.
        num_labels: ``m`` per input.
        second: ``I2`` needs second derivatives of every logit in every direction. ``"exact"``; ``"probes"``: unbiased
            estimate of the total variance from ``num_probes`` random sign vectors per layer; ``"auto"``: exact while
            parameters × inputs × classes ≤ 300,000; ``"skip"``.
        num_probes: of ``"probes"``.
        pairs: of inputs, for ``covariance_norm`` and ``fisher_norm`` of ``I1``. ``"all"``; ``"sampled"``: within chunks of
            inputs all, between chunks a random sample: the squares of both norms are unbiased, and the work grows with
            the number of inputs, not with its square; ``"auto"``: all up to 2,000 inputs.
        generator: draws the probes and the pairs; None means seed 0.
        memory_limit: bytes for what is kept and on the way.
        outputs: picks the logits from what the model returns.

    Raises:
        ValueError: another likelihood, several labels per input (tokens, pixels), numbers out of range, and all that
            :class:`FisherMatrix` refuses.
    """
    if num_labels < 1:
        raise ValueError(f"estimator_variance: num_labels must be >= 1, got {num_labels}")
    if second not in ("auto", "exact", "probes", "skip"):
        raise ValueError(f"estimator_variance: second must be 'auto', 'exact', 'probes' or 'skip', got {second!r}")
    if num_probes < 1:
        raise ValueError(f"estimator_variance: num_probes must be >= 1, got {num_probes}")
    if pairs not in ("auto", "all", "sampled"):
        raise ValueError(f"estimator_variance: pairs must be 'auto', 'all' or 'sampled', got {pairs!r}")
    scores = ScoreSource(model, inputs, make_likelihood(likelihood), memory_limit, outputs)
    wanted = pairs == "sampled" or (pairs == "auto" and scores.source.num_examples > ALL_PAIRS)
    sampled = wanted and scores.num_tiles > SAMPLED_TILES
    firsts = first_moments(scores, SAMPLED_TILES if sampled else None, generator)
    hessians, probes = _hessians(scores, second, num_probes, generator)
    chain = spectral_bounds(scores.source)

    def part(key: str | None) -> PartVariance:
        first = firsts[key]
        return PartVariance(
            name=NETWORK if key is None else key,
            total_variance=first.total / num_labels,
            covariance_norm=first.covariance / num_labels,
            bound=first.bound / num_labels,
            fisher_norm=first.fisher_norm,
            num_labels=num_labels,
            second=None if hessians is None else second_variance(hessians[key], scores, num_labels, probes),
            spectral_norm=first.spectral_norm,
            spectral_bound=None if key is None else chain.get(key),
        )

    layers = {block.name: part(block.name) for block in scores.source.blocks}
    return EstimatorVariance(**vars(part(None)), layers=layers, num_inputs=scores.source.num_examples, sampled_pairs=sampled)


def _hessians(
    scores: ScoreSource, mode: SecondMode, num_probes: int, generator: torch.Generator | None
) -> tuple[dict[str | None, Tensor] | None, int | None]:
    """Inner products of the logits' Hessians, and the number of probes (None: exact)."""
    work = scores.source.model.size * scores.source.num_examples * scores.classes
    if mode == "skip":
        return None, None
    if mode == "exact" or (mode == "auto" and work <= EXACT_WORK):
        return hessian_inner_products(scores, None, generator), None
    return hessian_inner_products(scores, num_probes, generator), num_probes


def second_variance(products: Tensor, scores: ScoreSource, num_labels: int, probes: int | None) -> SecondVariance:
    r"""Norms of :math:`\frac{1}{N^2 m} \sum_n \sum_{ab} H^n_{ab}\, \partial^2 h^a \otimes \partial^2 h^b`.

    Args:
        products: ``[N, C, N, C]``, Frobenius inner products of the Hessians of every input's logits.
    """
    p = scores.probabilities.double()
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    own = torch.einsum("nanb->nab", products)
    total = torch.einsum("nab,nab->", hessian, own)
    crossed = torch.einsum("nab,nbmc->namc", hessian, products)  # H_n M_nm
    square = torch.einsum("namc,mcna->", crossed, crossed)
    bound = torch.einsum("naa->n", own) @ torch.linalg.matrix_norm(hessian)
    scale = num_labels * len(p) ** 2
    return SecondVariance(float(total) / scale, math.sqrt(max(float(square), 0.0)) / scale, float(bound) / scale, probes)


def entrywise_variance(
    model: nn.Module,
    inputs: Any,
    likelihood: LikelihoodName | Likelihood = "categorical",
    num_labels: int = 1,
    *,
    estimator: Literal["first", "second"] = "first",
    memory_limit: int = 2 * 1024**3,
    outputs: Callable[[Any], Any] | None = None,
) -> Tensor:
    r"""Variance of every entry of ``I1`` (or ``I2``), ``[P, P]``: for models small enough to write that out.

    :math:`\frac1m [(S \circ S)^\top \mathrm{diag}(p) (S \circ S) - F \circ F]` for one input, and
    :math:`\frac1m [\sum_a p_a (\partial^2_{ij} h^a)^2 - (\sum_a p_a \partial^2_{ij} h^a)^2]`; of several inputs, the
    variance of the mean given the inputs.

    Raises:
        ValueError: the matrix does not fit into ``memory_limit``, and as :func:`estimator_variance`.
    """
    if num_labels < 1:
        raise ValueError(f"entrywise_variance: num_labels must be >= 1, got {num_labels}")
    if estimator not in ("first", "second"):
        raise ValueError(f"entrywise_variance: estimator must be 'first' or 'second', got {estimator!r}")
    scores = ScoreSource(model, inputs, make_likelihood(likelihood), memory_limit, outputs)
    size, item = scores.source.model.size, scores.source.model.row_dtype.itemsize
    if 4 * size * size * item > memory_limit:
        raise ValueError(
            f"entrywise_variance: a matrix of {size} parameters needs {readable(4 * size * size * item)}, memory_limit "
            f"is {readable(memory_limit)}. Raise memory_limit, or use estimator_variance, which needs no such matrix."
        )
    variance = entrywise_first(scores) if estimator == "first" else entrywise_second(scores)
    return variance / (num_labels * scores.source.num_examples**2)
