"""Quality of probabilistic predictions: likelihood, calibration, detection of unfamiliar inputs.

Probabilities are ``[..., classes]`` and targets the class numbers ``[...]`` (leading dimensions are examples); every
result is a 0-dim float64 tensor. Give the mean of the probabilities over an ensemble, not of the logits or losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def accuracy(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Share of examples whose most probable class is the target."""
    p, y = _checked(probabilities, targets)
    return (p.argmax(-1) == y).double().mean()


def negative_log_likelihood(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""``-(1/N) Σ ln p(y_n)`` in nats. For an ensemble :math:`p` is the averaged probability.

    A probability of zero for a target that occurred gives infinity.
    """
    p, y = _checked(probabilities, targets)
    return -p.gather(-1, y.unsqueeze(-1)).log().mean()


def brier_score(probabilities: Tensor, targets: Tensor) -> Tensor:
    """``(1/N) Σ_n Σ_c (p_nc − [c = y_n])²``: summed over classes, between 0 and 2 (Brier 1950)."""
    p, y = _checked(probabilities, targets)
    return (p.square().sum(-1) - 2 * p.gather(-1, y.unsqueeze(-1)).squeeze(-1) + 1).mean()


@dataclass(frozen=True)
class ReliabilityDiagram:
    """Confidence of the top label against its accuracy, in equal-width bins.

    Attributes:
        edges: ``[num_bins + 1]``, from 0 to 1.
        counts: ``[num_bins]`` examples per bin.
        confidence, accuracy: ``[num_bins]`` means per bin; NaN in empty bins.
    """

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def calibration_error(self) -> Tensor:
        """``Σ_b (n_b / N) |accuracy_b − confidence_b|``."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return (gaps * self.counts).sum() / self.counts.sum()


def reliability_diagram(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> ReliabilityDiagram:
    """Bins ``(edge_b, edge_b+1]`` of the top label's confidence (Guo et al. 2017, arXiv:1706.04599).

    Raises:
        ValueError: if ``num_bins`` is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"reliability_diagram: num_bins must be >= 1, got {num_bins}")
    p, y = _checked(probabilities, targets)
    confidence, label = p.max(-1)
    edges = torch.arange(num_bins + 1, dtype=p.dtype, device=p.device) / num_bins
    # As exact as the probabilities: 0.6 in single precision is above 0.6 in double, but not above the edge of its bin.
    edges = edges.to(torch.promote_types(probabilities.dtype, torch.float32)).to(p.dtype)
    index = (torch.bucketize(confidence, edges) - 1).clamp(0, num_bins - 1)
    zeros = torch.zeros(num_bins, dtype=p.dtype, device=p.device)
    counts = zeros.index_add(0, index, torch.ones_like(confidence))
    return ReliabilityDiagram(
        edges=edges,
        counts=counts,
        confidence=zeros.index_add(0, index, confidence) / counts,
        accuracy=zeros.index_add(0, index, (label == y).to(p.dtype)) / counts,
    )


def expected_calibration_error(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> Tensor:
    """Mean gap between confidence and accuracy over equal-width bins of the top label's confidence."""
    return reliability_diagram(probabilities, targets, num_bins).calibration_error


def auroc(familiar: Tensor, unfamiliar: Tensor) -> Tensor:
    """Probability that an unfamiliar input has the larger score, ties counting one half (area under the ROC curve).

    Args:
        familiar: scores ``[n]`` of inputs like those trained on, e.g. the entropy or the mutual information.
        unfamiliar: scores ``[m]`` of other inputs; larger is expected.
    """
    low, high = _scores(familiar, unfamiliar)
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high, right=False)
    not_above = torch.searchsorted(ordered, high, right=True)
    return (0.5 * (below + not_above).double()).mean() / low.numel()


def fpr95(familiar: Tensor, unfamiliar: Tensor) -> Tensor:
    """Share of unfamiliar inputs that pass when at least 95 % of the familiar ones do (score up to a threshold).

    Args:
        familiar, unfamiliar: as for :func:`auroc`.
    """
    low, high = _scores(familiar, unfamiliar)
    # The smallest threshold that lets 95 % pass is the score of rank ceil(0.95 n); integers, so that 0.95 n is exact.
    rank = -(-95 * low.numel() // 100)
    return (high <= low.sort().values[rank - 1]).double().mean()


def _checked(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``[examples, classes]`` in float64 and ``[examples]``."""
    if probabilities.dim() < 2 or targets.shape != probabilities.shape[:-1]:
        raise ValueError(
            f"metrics: got probabilities of shape {list(probabilities.shape)} and targets of shape "
            f"{list(targets.shape)}, expected [..., classes] and class numbers [...]."
        )
    if targets.dtype.is_floating_point or targets.numel() == 0:
        raise ValueError(f"metrics: targets must be at least one whole class number, got {targets.numel()} of {targets.dtype}.")
    classes = probabilities.shape[-1]
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"metrics: there are {classes} classes, but targets from {lowest} to {highest}, expected 0 to {classes - 1}. "
            "Leave out what has no class: metric(probabilities[targets >= 0], targets[targets >= 0])."
        )
    p = probabilities.detach().double().flatten(0, -2)
    if not bool(((p.sum(-1) - 1).abs() < 1e-2).all()) or bool((p < 0).any()):
        raise ValueError(
            "metrics: the probabilities of an example must be >= 0 and sum to 1 over the last dimension. "
            "Give probabilities, not logits: logits.softmax(-1). Of one output with a Bernoulli likelihood make two classes: "
            "torch.stack([1 - p, p], -1)."
        )
    return p, targets.detach().flatten().long()


def _scores(familiar: Tensor, unfamiliar: Tensor) -> tuple[Tensor, Tensor]:
    for name, scores in (("familiar", familiar), ("unfamiliar", unfamiliar)):
        if scores.numel() == 0 or not bool(torch.isfinite(scores).all()):
            raise ValueError(f"metrics: the {name} scores must be finite and at least one, got {scores.numel()}.")
    return familiar.detach().double().flatten(), unfamiliar.detach().double().flatten()
