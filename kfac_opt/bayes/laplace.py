"""Laplace's approximation after the training: curvature over a whole data set, evidence, prior precision.

MacKay 1992; with Kronecker factors Ritter, Botev & Barber 2018. The posterior is ``N(μ, (N F / T + Λ)⁻¹)`` around the
trained weights, ``Λ`` the prior precision. Predict with :func:`kfac_opt.bayes.linearized.linearized_predict`: drawing weights
from a post-hoc Laplace posterior often predicts badly, since the network is far from linear over its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kfac_opt._capture.collect import collect
from kfac_opt._capture.collector import Collector
from kfac_opt._capture.distributed import active_group, rank, sum_over_ranks_
from kfac_opt._capture.outputs import pick_logits
from kfac_opt._capture.wrappers import unwrapped
from kfac_opt._curvature.block import Damping, State
from kfac_opt._curvature.eigenbasis import EigenbasisBlock
from kfac_opt._step.curvature import Curvature
from kfac_opt._step.options import check_model, check_number, parameter_groups
from kfac_opt._step.placement import Replicated
from kfac_opt._step.seeds import LABELS, derive_seed, seeded
from kfac_opt._step.tracking import BlockOptions, TrackedBlock, track
from kfac_opt.bayes.posterior import Posterior, PosteriorBlock, Width
from kfac_opt.bayes.posteriors import build_posterior, parameter_names, posterior_blocks
from kfac_opt.layers.embedding import padding_rows
from kfac_opt.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, LikelihoodName, make_likelihood

Batches = Iterable[tuple[Any, Tensor]]


def fit_laplace(
    model: nn.Module,
    loader: Batches,
    likelihood: LikelihoodName | Likelihood = "categorical",
    *,
    prior_precision: float | Literal["evidence"] = 1.0,
    temperature: float = 1.0,
    params: Any = None,
    curvature: Literal["kronecker", "eigenbasis", "diagonal"] = "kronecker",
    fisher: Literal["mc", "exact"] = "exact",
    label_samples: int = 1,
    weight_sharing: Literal["expand", "reduce"] = "expand",
    max_factor_dim: int = 8192,
    outputs: Callable[[Any], Any] | None = None,
    factor_dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | None = None,
) -> Posterior:
    """Laplace posterior around the current weights, its curvature taken over all of ``loader``.

    The model is seen in the mode it is in (call ``model.eval()`` first); weights, gradients, mode and global random
    state are left alone. An optimizer may stay attached to the model.

    Args:
        loader: iterable of ``(inputs, targets)``, read once (twice for ``"eigenbasis"``). It decides ``num_data``. Targets
            that are the likelihood's ``ignore_index`` (padding) count neither there nor in the curvature.
        likelihood: as for :class:`kfac_opt.KFAC`.
        prior_precision: of the prior ``N(0, I / prior_precision)``; ``"evidence"`` maximises the log marginal
            likelihood.
        temperature: divides the log-likelihood; below 1 the posterior is narrower.
        params: None for all trainable parameters, or some (those of the last layer for a last-layer Laplace).
        curvature, fisher, label_samples, weight_sharing, max_factor_dim, outputs, factor_dtype: as for
            :class:`kfac_opt.KFAC`. Diagonal blocks are estimates even with ``"exact"``, one draw of signs per batch.
        generator: seeds labels and signs; None means seed 0.
        process_group: ranks that hold other parts of the data.

    Returns:
        The posterior, with ``num_data`` and ``log_likelihood`` (of the data at the weights, in nats).

    Raises:
        ValueError: for an empty loader, batches without targets, or numbers out of range.

    >>> model = nn.Linear(2, 3)
    >>> batches = [(torch.randn(10, 2), torch.randint(3, (10,)))]
    >>> posterior = fit_laplace(model, batches, prior_precision="evidence")
    >>> posterior.num_data
    10
    """
    check_model("fit_laplace", model)
    if prior_precision != "evidence":
        check_number("fit_laplace", "prior_precision", prior_precision, low=0.0, open_low=True)
    check_number("fit_laplace", "temperature", temperature, low=0.0, open_low=True)
    base_seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))
    ranks = active_group(process_group)
    collector = Collector(
        unwrapped(model),
        make_likelihood(likelihood),
        fisher,
        label_samples,
        outputs,
        "mean",
        lambda index, device: seeded(derive_seed(base_seed, LABELS, rank(ranks), 0, index), device),
        process_group,
    )
    fit = _Fit(model, collector, BlockOptions("exact", weight_sharing, max_factor_dim, factor_dtype, needs_basis=True))
    parameters = parameter_groups("fit_laplace", model, params)
    # Scales of an eigenbasis need the bases of all data first.
    kinds = ("kronecker", "eigenbasis") if curvature == "eigenbasis" else (curvature,)
    for kind in kinds:
        num_data, log_likelihood = fit.run(loader, kind, parameters)
    width = Width(num_data / temperature, 1.0 if prior_precision == "evidence" else float(prior_precision))
    posterior = build_posterior(
        "fit_laplace",
        model,
        posterior_blocks(
            parameter_names(model),
            fit.tracked.values(),
            fit.state_of,
            lambda _: width,
            constant=padding_rows(model),
        ),
        [parameter for group in parameters for parameter in group["params"]],
        width=width,
        likelihood=collector.likelihood,
        seed=base_seed,
        num_data=num_data,
    )
    posterior.log_likelihood = log_likelihood
    if prior_precision == "evidence":
        posterior = posterior.with_width(Width(width.ess, best_prior_precision(posterior)))
    return posterior


class _Rounds:
    """Every block takes the estimate of a round; bases are made in the first round alone."""

    def __init__(self, num_groups: int, *, first: bool) -> None:
        self.num_groups, self.first = num_groups, first

    def set_blocks(self, blocks: Mapping[str, TrackedBlock], costs: Mapping[str, float]) -> None:
        """Nothing depends on them."""

    def estimates(self, step: int) -> set[int]:
        """Always, those of all groups."""
        return set(range(self.num_groups))

    def refreshes(self, name: str, step: int) -> bool:
        """Scales are taken in the bases of the first round."""
        return self.first


class _Fit:
    """Curvature over whole rounds through the data: blocks and their state, with no optimizer around them."""

    def __init__(self, model: nn.Module, collector: Collector, options: BlockOptions) -> None:
        self.model, self.collector, self.options = model, collector, options
        self.tracked: dict[str, TrackedBlock] = {}
        self.groups: list[dict[str, Any]] = []
        self._states: dict[str, State] = {}
        self.log_likelihood = torch.zeros((), dtype=torch.float64)  # of the data of this round

    def states(self) -> dict[str, State]:
        """Of all blocks."""
        return self._states

    def state_of(self, entry: TrackedBlock) -> State:
        """Of one block."""
        return self._states[entry.name]

    def damping_of(self, entry: TrackedBlock) -> Damping:
        """Inverses are not asked for: bases alone."""
        return Damping(1.0, "absolute")

    def run(self, loader: Batches, curvature: str, parameters: list[dict[str, Any]]) -> tuple[int, float]:
        """One round; bases of an earlier one are taken over. Returns ``N`` and the log-likelihood."""
        self.groups = [{"params": group["params"], "curvature": curvature, "factor_decay": 0.0} for group in parameters]
        self.tracked = track("fit_laplace", self.model, self.groups, self.options)
        before, self._states = self._states, {}
        for name, entry in self.tracked.items():
            self._states[name] = entry.block.init_state(entry.weight.device)
            if isinstance(entry.block, EigenbasisBlock):
                self._states[name].update(before[name])
        rounds = _Rounds(len(self.groups), first=not before)
        fitted = Curvature(self, rounds, Replicated(self.collector.process_group))
        in_force = {n: s if self.tracked[n].block.ready(s) else None for n, s in self._states.items()}
        self.log_likelihood = torch.zeros((), dtype=torch.float64)
        pending = collect(self.collector, self.tracked, in_force, self._passes(loader))
        totals = torch.stack([self.log_likelihood, torch.tensor(float(pending.num_terms), dtype=torch.float64)])
        totals = totals.to(next(self.model.parameters()).device)
        sum_over_ranks_([totals], active_group(self.collector.process_group))
        if not int(totals[1]):
            raise ValueError("fit_laplace: the loader has no batches, or none with finite outputs.")
        with torch.no_grad():
            fitted.update(pending, 0)
            fitted.refresh(0)
        return int(totals[1]), float(totals[0])

    def _passes(self, loader: Batches) -> Iterator[tuple[Callable[[], None], Tensor | None]]:
        """One for each batch; targets that are no labels do not count."""
        likelihood = self.collector.likelihood
        for x, y in _pairs(loader):
            mask = None
            if isinstance(likelihood, Categorical) and not y.is_floating_point():
                labelled = y != likelihood.ignore_index
                mask = None if bool(labelled.all()) else labelled
            yield partial(self._run, x, y), mask

    def _run(self, x: Any, y: Tensor) -> None:
        """The forward of one batch, whose log-likelihood is added, in nats."""
        logits, mask = pick_logits(self.model(**x) if isinstance(x, Mapping) else self.model(x), self.collector.outputs)
        terms = _log_likelihood(self.collector.likelihood, logits.detach().double(), y.to(logits.device), mask)
        self.log_likelihood += terms.to(self.log_likelihood.device)


def _log_likelihood(likelihood: Likelihood, logits: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Of the targets ``y`` that ``mask`` keeps and that are no ``ignore_index``: a sum over terms, in nats.

    Raises:
        ValueError: for targets of another shape, which would be paired with every output.
    """
    if isinstance(likelihood, Categorical):
        dim, soft = likelihood.dimension(logits), y.is_floating_point()
        rows = logits.movedim(dim, -1)
        _check_targets(y, logits.shape if soft else rows.shape[:-1])
        if soft:
            terms = (y.movedim(dim, -1) * rows.log_softmax(-1)).sum(-1)
            return terms.sum() if mask is None else terms[mask].sum()
        keep = y != likelihood.ignore_index
        keep = keep if mask is None else keep & mask
        return -F.cross_entropy(rows[keep], y[keep], reduction="sum")
    if isinstance(likelihood, (Gaussian, Bernoulli)):
        _check_targets(y, logits.shape)
    if mask is not None:
        logits, y = logits[mask], y[mask]
    if not len(logits):
        return logits.new_zeros(())
    constant = 0.5 * logits.numel() * math.log(2 * math.pi * likelihood.variance) if isinstance(likelihood, Gaussian) else 0.0
    return -likelihood.loss(logits, y.double() if y.is_floating_point() else y) * likelihood.num_terms(logits) - constant


def _check_targets(y: Tensor, expected: torch.Size) -> None:
    if y.shape != expected:
        raise ValueError(
            f"fit_laplace: the targets are {list(y.shape)}, expected {list(expected)} for what the model returns. Reshape "
            "them: other shapes would pair targets with the wrong outputs."
        )


def _pairs(loader: Batches) -> Iterator[tuple[Any, Tensor]]:
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise ValueError(
                f"fit_laplace: the loader yielded {type(batch).__name__}, expected pairs (inputs, targets): the "
                "log-likelihood of the data is part of the evidence."
            )
        yield batch[0], batch[1]


def log_marginal_likelihood(posterior: Posterior, log_likelihood: float | None = None) -> Tensor:
    r"""Laplace's evidence in nats, 0-dim float64.

    :math:`\ln p(D) \approx \ln p(D | \mu) - \frac12 \Lambda \|\mu\|^2 + \frac12 D \ln \Lambda
    - \frac12 \sum \ln(\mathrm{ess}\,\lambda + \Lambda)`; at temperature 1 and where the data's log-likelihood has
    its maximum together with the prior.

    Args:
        posterior: with a floor of zero.
        log_likelihood: of the data at the means; None: that of ``fit_laplace``.

    Raises:
        ValueError: if the log-likelihood is unknown.
    """
    if log_likelihood is None:
        log_likelihood = posterior.log_likelihood
    if log_likelihood is None:
        raise ValueError(
            "log_marginal_likelihood: this posterior does not know the log-likelihood of its data. Fit it with "
            "fit_laplace, or pass log_likelihood=."
        )
    total = torch.full((), log_likelihood, dtype=torch.float64, device=posterior.device)
    for block in posterior.blocks:
        precision = block.width.prior_precision
        total = total - 0.5 * precision * _squared_norm(posterior, block) + 0.5 * block.num_random * math.log(precision)
        total = total - 0.5 * block.random_part(block.width.ess * block.form.eigenvalues.double() + precision, 1.0).log().sum()
    return total


def best_prior_precision(posterior: Posterior, blocks: Sequence[PosteriorBlock] | None = None) -> float:
    r"""The prior precision that maximises the log marginal likelihood (MacKay 1992, eq. 4.4).

    At the maximum :math:`\Lambda \|\mu\|^2 = \sum \frac{\mathrm{ess}\,\lambda}{\mathrm{ess}\,\lambda + \Lambda}`, the
    number of well-determined parameters. The quotient of both sides is monotone in Λ, so the maximum is the only one.

    Args:
        blocks: those that share the precision, all by default; one block gives the best precision of its layer.

    Raises:
        ValueError: if there is no maximum: all means are zero, or nothing is determined by the data.
    """
    blocks = posterior.blocks if blocks is None else blocks
    norm = float(torch.stack([_squared_norm(posterior, block) for block in blocks]).sum())
    spectrum = torch.cat([block.width.ess * block.form.eigenvalues.double().flatten() for block in blocks])
    if norm <= 0 or not bool(spectrum.sum() > 0):
        raise ValueError(
            "best_prior_precision: the evidence has no maximum, because "
            + ("all means are zero." if norm <= 0 else "the curvature is zero.")
            + " Give a prior precision."
        )
    low, high = -60.0, 60.0  # bisection over ln Λ: determined parameters per Λ fall monotonically
    for _ in range(80):
        middle = 0.5 * (low + high)
        determined = float((spectrum / (spectrum + math.exp(middle))).sum()) / math.exp(middle)
        low, high = (middle, high) if determined > norm else (low, middle)
    return math.exp(0.5 * (low + high))


def _squared_norm(posterior: Posterior, block: PosteriorBlock) -> Tensor:
    means = block.layout.to_matrix(*[posterior.mean[name].double() for name in block.names])
    return block.random_part(means).square().sum()
