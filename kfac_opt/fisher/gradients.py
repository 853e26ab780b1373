r"""Per-example gradients over a whole training set: sizes, outliers, main directions (Yashima et al., gradient data).

``G_l [N, P_l]`` holds the loss gradient of every example in layer ``l``; the layer's empirical Fisher is
:math:`G_l^\top G_l / N`. Neither is written out: norms, projections and eigenvectors come from layer inputs and output
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfac_opt.fisher.matrix import FisherMatrix
from kfac_opt.likelihoods import Likelihood, LikelihoodName

NETWORK = "(network)"
"""Name of the whole among the layers' names."""
OutlierRule = Literal["centered", "uncentered"]
OUTLIER_FACTOR = 10.0
SMALL = 0.1
"""Projections below this (or this times the root of the eigenvalue) count as small, as in the study."""


@dataclass(frozen=True)
class Outliers:
    """Examples whose gradient is far larger than usual.

    Attributes:
        indices: positions in the order of the data, the largest norm first.
        threshold: the norm above which an example counts; NaN when undefined.
        median, mad: of the norms; ``MAD = median(|x - median x|)``.
        undefined: True when MAD is zero (half of the norms are equal): no example counts then.
    """

    indices: Tensor
    threshold: float
    median: float
    mad: float
    undefined: bool

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class LayerGradients:
    """Gradient data of one layer, or of the whole network (``"(network)"``), at one moment.

    Attributes:
        name: of the module.
        norms: ``[N]``, norm of every example's loss gradient.
        mean: ``[P_l]``, the mean gradient.
        eigenvalues: ``[k]``, largest eigenvalues of the empirical Fisher, descending.
        eigenvectors: ``[P_l, k]``; the sign makes the projection of largest size positive.
        projections: ``a [N, k]``, the gradients along the eigenvectors; ``mean(a²)`` is the eigenvalue.
    """

    name: str
    norms: Tensor
    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    projections: Tensor

    def outliers(self, rule: OutlierRule = "centered", factor: float = OUTLIER_FACTOR) -> Outliers:
        """Examples with ``norm > median + factor · MAD``; ``"uncentered"``, as published: ``norm > factor · MAD``.

        The published rule depends on where zero lies: where the norms spread little, all of them are outliers.
        """
        if rule not in ("centered", "uncentered"):
            raise ValueError(f"rule must be 'centered' or 'uncentered', got {rule!r}")
        x = self.norms.double()
        median = _median(x)
        mad = _median((x - median).abs())
        if mad == 0.0:
            return Outliers(torch.zeros(0, dtype=torch.long), float("nan"), median, mad, undefined=True)
        threshold = factor * mad + (median if rule == "centered" else 0.0)
        found = (x > threshold).nonzero().squeeze(-1)
        order = x[found].argsort(descending=True)
        return Outliers(found[order].cpu(), threshold, median, mad, undefined=False)

    @property
    def drift(self) -> float:
        """Norm of the mean gradient."""
        return float(self.mean.norm())

    def diffusion(self, batch_size: int) -> float:
        r"""Standard deviation of a mini-batch gradient: :math:`\sqrt{(\overline{\|g\|^2} - \|\bar g\|^2) / B}`."""
        spread = float(self.norms.double().square().mean()) - float(self.mean.double().square().sum())
        return (max(spread, 0.0) / batch_size) ** 0.5

    def small_share(self, index: int = 0, *, relative: bool = False) -> float:
        """Share of the examples with ``|a| < 0.1``, or ``|a| < 0.1 √λ`` with ``relative``."""
        limit = SMALL * (float(self.eigenvalues[index]) ** 0.5 if relative else 1.0)
        return float((self.projections[:, index].abs() < limit).double().mean())

    def peak_ratio(self, index: int = 0) -> float:
        """``max|a| / median|a|``; infinite when more than half of the projections are zero."""
        size = self.projections[:, index].abs().double()
        median = _median(size)
        return float(size.max()) / median if median > 0.0 else float("inf")

    def trimmed_eigenvalue(self, index: int = 0, share: float = 0.1) -> float:
        """``mean(a²)`` without the ``share`` of the examples with the largest ``|a|``, along the same eigenvector."""
        if not 0.0 <= share < 1.0:
            raise ValueError(f"share must be in [0, 1), got {share}")
        squares = self.projections[:, index].double().square().sort().values
        kept = max(1, len(squares) - int(share * len(squares)))
        return float(squares[:kept].mean())

    def histogram(self, edges: Tensor, index: int = 0) -> Tensor:
        """Counts of the projections between ``edges`` (see :func:`symmetric_log_bins`), outer ones included."""
        inner = torch.searchsorted(edges, self.projections[:, index].double().cpu(), right=True)
        return torch.bincount(inner, minlength=len(edges) + 1)


@dataclass(frozen=True)
class GradientStatistics:
    """Gradient data of all layers and of the whole network.

    Attributes:
        layers: by module name.
        network: all parameters together.
        num_examples: ``N``; loss terms where an example has several (tokens): their gradients are then counted
            one by one, in the order of the data.
    """

    layers: dict[str, LayerGradients]
    network: LayerGradients
    num_examples: int

    def summary(self, batch_size: int = 1) -> dict[str, dict[str, float]]:
        """Plain numbers by layer (the network under ``"(network)"``), for a log or a table.

        Args:
            batch_size: of the training run, for ``diffusion``.
        """
        return {part.name: _summary(part, batch_size) for part in (self.network, *self.layers.values())}


def gradient_statistics(
    model: nn.Module,
    data: Any,
    likelihood: LikelihoodName | Likelihood = "categorical",
    *,
    num_eigenpairs: int = 1,
    tolerance: float | None = None,
    memory_limit: int = 2 * 1024**3,
    outputs: Callable[[Any], Any] | None = None,
) -> GradientStatistics:
    """Norms, outliers, eigenpairs and projections of the per-example gradients on all of ``data``.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = gradient_statistics(model, (torch.randn(50, 4), torch.randint(3, (50,))))
    >>> found.layers["0"].norms.shape, found.network.outliers().indices.dtype
    (torch.Size([50]), torch.int64)

    Args:
        model: at the weights it has now, in evaluation mode where it has batch normalization or dropout.
        data: ``(inputs, targets)``, or a loader of such pairs that gives them in the same order every time.
        likelihood: whose negative log-likelihood is the loss.
        num_eigenpairs: of each layer's empirical Fisher and the network's.
        tolerance: of the eigenpairs, as in :meth:`FisherMatrix.top_eigenpairs`.
        memory_limit: bytes; when the layers' inputs and output gradients of all examples do not fit, they are made
            anew for every product.
        outputs: picks the logits from what the model returns.

    Raises:
        ValueError: as :class:`FisherMatrix` does; ``num_eigenpairs`` < 1.
    """
    if num_eigenpairs < 1:
        raise ValueError(f"gradient_statistics: num_eigenpairs must be >= 1, got {num_eigenpairs}")
    by_layer = FisherMatrix(model, data, likelihood, "empirical", "layer_wise", memory_limit=memory_limit, outputs=outputs)
    whole = by_layer.with_blocks("full")
    norms, means = _norms_and_means(by_layer)
    pairs = by_layer.block_eigenpairs(num_eigenpairs, tolerance=tolerance)
    joint = whole.block_eigenpairs(num_eigenpairs, tolerance=tolerance)[""]
    projections, joint_projections = _projections(by_layer, pairs, joint)
    layers = {name: _oriented(name, norms[name].sqrt(), means[name], *pairs[name], projections[name]) for name in pairs}
    all_norms = torch.stack(list(norms.values())).sum(0).sqrt()
    all_means = torch.cat(list(means.values()))
    network = _oriented(NETWORK, all_norms, all_means, *joint, joint_projections)
    return GradientStatistics(layers, network, by_layer.num_terms)


def symmetric_log_bins(low: float = -3.0, high: float = 3.0, per_decade: int = 2) -> Tensor:
    """Edges ``-10^high … -10^low, 10^low … 10^high``: the same for a whole run, so that histograms compare.

    The middle bin holds everything between ``-10^low`` and ``10^low``; values beyond the ends have bins of their own.
    """
    positive = torch.logspace(low, high, round((high - low) * per_decade) + 1, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def _norms_and_means(fisher: FisherMatrix) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Squared norms ``[N]`` of every example's gradient, and the mean gradient, by block."""
    squares: dict[str, list[Tensor]] = {name: [] for name in fisher.block_slices}
    sums = {name: torch.zeros(()) for name in fisher.block_slices}
    for name, store in fisher.rows_by_block():
        squares[name].append(store.squares().flatten())
        ones = torch.ones(store.examples, store.columns, 1, dtype=fisher.dtype, device=fisher.device)
        sums[name] = sums[name].to(fisher.device) + store.expand(ones).squeeze(-1)
    return (
        {name: torch.cat(parts) for name, parts in squares.items()},
        {name: total / fisher.num_terms for name, total in sums.items()},
    )


def _projections(
    fisher: FisherMatrix, pairs: dict[str, tuple[Tensor, Tensor]], joint: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients along each block's own eigenvectors, and along those of the whole network."""
    found: dict[str, list[Tensor]] = {name: [] for name in pairs}
    shares: dict[str, list[Tensor]] = {name: [] for name in pairs}
    for name, store in fisher.rows_by_block():
        own = pairs[name][1]
        both = store.project(torch.cat([own, joint[1][fisher.block_slices[name]]], dim=1)).flatten(0, 1)
        found[name].append(both[:, : own.shape[1]])
        shares[name].append(both[:, own.shape[1] :])
    joined = torch.stack([torch.cat(parts) for parts in shares.values()]).sum(0)
    return {name: torch.cat(parts) for name, parts in found.items()}, joined


def _oriented(
    name: str, norms: Tensor, mean: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, projections: Tensor
) -> LayerGradients:
    """Fixes the signs: the projection of largest size is positive."""
    largest = projections.gather(0, projections.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(largest < 0, -1.0, 1.0).to(projections.dtype)
    return LayerGradients(name, norms, mean, eigenvalues, eigenvectors * sign, projections * sign)


def _summary(part: LayerGradients, batch_size: int) -> dict[str, float]:
    centered, uncentered = part.outliers("centered"), part.outliers("uncentered")
    return {
        "outliers": float(len(centered)),
        "outliers_uncentered": float(len(uncentered)),
        "median_norm": centered.median,
        "mad_norm": centered.mad,
        "max_norm": float(part.norms.max()),
        "mad_is_zero": float(centered.undefined),
        "eigenvalue": float(part.eigenvalues[0]),
        "trimmed_eigenvalue": part.trimmed_eigenvalue(),
        "small_share": part.small_share(),
        "small_share_relative": part.small_share(relative=True),
        "peak_ratio": part.peak_ratio(),
        "drift": part.drift,
        "diffusion": part.diffusion(batch_size),
    }


def _median(values: Tensor) -> float:
    """The mean of the two middle values for an even count (``torch.median`` returns the lower one)."""
    ordered = values.double().sort().values
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return 0.5 * float(ordered[middle - 1] + ordered[middle])
