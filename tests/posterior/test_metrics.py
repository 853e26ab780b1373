"""Metrics against torchmetrics, closed forms and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kfac_opt.bayes import metrics
from tests.support import close


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(500, 7, generator=generator, dtype=torch.float64)).softmax(-1)
    return probabilities, torch.multinomial(probabilities.sqrt(), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_equals_torchmetrics(batch: tuple[Tensor, Tensor], num_bins: int):
    torchmetrics = pytest.importorskip("torchmetrics")
    theirs = torchmetrics.functional.calibration_error(*batch, task="multiclass", num_classes=7, n_bins=num_bins)
    # torchmetrics works in single precision: 1e-7 times 500 terms.
    assert float(metrics.expected_calibration_error(*batch, num_bins)) == pytest.approx(float(theirs), abs=5e-5)


def test_accuracy_and_likelihood_equal_torch_and_torchmetrics(batch: tuple[Tensor, Tensor]):
    torchmetrics = pytest.importorskip("torchmetrics")
    theirs = torchmetrics.functional.accuracy(*batch, task="multiclass", num_classes=7, average="micro")
    assert float(metrics.accuracy(*batch)) == pytest.approx(float(theirs), abs=1e-6)
    close(metrics.negative_log_likelihood(*batch), torch.nn.functional.nll_loss(batch[0].log(), batch[1]))


def test_brier_score_is_the_squared_distance_to_the_one_hot_label(batch: tuple[Tensor, Tensor]):
    probabilities, targets = batch
    one_hot = torch.nn.functional.one_hot(targets, 7)
    close(metrics.brier_score(*batch), (probabilities - one_hot).square().sum(1).mean())


def test_auroc_equals_torchmetrics_also_with_ties():
    torchmetrics = pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(1)
    familiar = torch.randint(0, 20, (300,), generator=generator).double() / 40
    unfamiliar = torch.randint(5, 30, (200,), generator=generator).double() / 40
    labels = torch.cat([torch.zeros(300), torch.ones(200)]).long()
    theirs = torchmetrics.functional.auroc(torch.cat([familiar, unfamiliar]), labels, task="binary")
    assert float(metrics.auroc(familiar, unfamiliar)) == pytest.approx(float(theirs), abs=1e-6)


def test_fpr95_equals_torchmetrics_specificity_at_sensitivity():
    torchmetrics = pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(2)
    familiar, unfamiliar = torch.rand(400, generator=generator) * 0.7, 0.2 + torch.rand(300, generator=generator) * 0.7
    # The familiar inputs are the positives, accepted when their score is small.
    scores, labels = 1 - torch.cat([familiar, unfamiliar]), torch.cat([torch.ones(400), torch.zeros(300)]).long()
    specificity, _ = torchmetrics.functional.classification.binary_specificity_at_sensitivity(
        scores, labels, min_sensitivity=0.95
    )
    assert float(metrics.fpr95(familiar, unfamiliar)) == pytest.approx(1 - float(specificity), abs=1e-6)


def test_perfect_and_hopeless_detection():
    low, high = torch.linspace(0, 1, 100), torch.linspace(2, 3, 50)
    assert float(metrics.auroc(low, high)) == 1.0
    assert float(metrics.auroc(high, low)) == 0.0
    assert float(metrics.auroc(low, low)) == pytest.approx(0.5)
    assert float(metrics.fpr95(low, high)) == 0.0
    assert float(metrics.fpr95(high, low)) == 1.0


def test_reliability_diagram_equals_a_plain_loop(batch: tuple[Tensor, Tensor]):
    probabilities, targets = batch
    diagram = metrics.reliability_diagram(*batch, num_bins=5)
    confidence, label = probabilities.max(1)
    for b in range(5):
        inside = [n for n in range(500) if b / 5 < confidence[n] <= (b + 1) / 5]
        assert int(diagram.counts[b]) == len(inside)
        if inside:
            close(diagram.confidence[b], confidence[inside].mean())
            close(diagram.accuracy[b], (label[inside] == targets[inside]).double().mean())
        else:
            assert math.isnan(diagram.accuracy[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bins", [5, 10, 15])
def test_a_confidence_on_the_edge_lies_in_the_bin_below_in_every_precision(dtype: torch.dtype, num_bins: int):
    """What ensembles of few members give: shares of votes."""
    confidence = torch.arange(num_bins + 1, dtype=dtype) / num_bins
    confidence = confidence[confidence >= 0.5]
    targets = torch.zeros(len(confidence), dtype=torch.int64)
    diagram = metrics.reliability_diagram(torch.stack([confidence, 1 - confidence], -1), targets, num_bins)
    expected = torch.zeros(num_bins, dtype=torch.float64)
    expected[-len(confidence) :] = 1
    close(diagram.counts, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_targets_of_every_whole_type_are_class_numbers(dtype: torch.dtype):
    probabilities, targets = torch.tensor([[0.2, 0.8], [0.7, 0.3]]), torch.tensor([1, 1])
    for metric in (metrics.negative_log_likelihood, metrics.brier_score, metrics.accuracy, metrics.expected_calibration_error):
        close(metric(probabilities, targets.to(dtype)), metric(probabilities, targets))


def test_sequences_are_flattened_and_the_mean_probability_beats_the_mean_loss(batch: tuple[Tensor, Tensor]):
    probabilities, targets = batch
    close(metrics.brier_score(probabilities.view(100, 5, 7), targets.view(100, 5)), metrics.brier_score(*batch))
    other = probabilities.roll(1, 0)
    single = (metrics.negative_log_likelihood(probabilities, targets) + metrics.negative_log_likelihood(other, targets)) / 2
    assert float(metrics.negative_log_likelihood((probabilities + other) / 2, targets)) < float(single)


def test_impossible_label_has_infinite_likelihood():
    assert metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).isinf()


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4).long(), "Give probabilities, not logits"),
        (torch.full((4, 2), 0.5), torch.zeros(3).long(), r"targets of shape \[3\]"),
        (torch.full((4, 2), 0.5), torch.zeros(4), "whole class number"),
        (torch.full((4,), 0.5), torch.zeros(4).long(), r"expected \[..., classes\]"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), r"there are 2 classes, but targets from 0 to 2, expected 0 to 1"),
        (torch.full((2, 2), 0.5), torch.tensor([-100, 1]), r"targets from -100 to 1.*probabilities\[targets >= 0\]"),
    ],
)
def test_bad_input_is_explained(probabilities: Tensor, targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        metrics.negative_log_likelihood(probabilities, targets)


def test_bad_scores_and_bins_are_explained(batch: tuple[Tensor, Tensor]):
    with pytest.raises(ValueError, match="unfamiliar scores must be finite"):
        metrics.auroc(torch.zeros(3), torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="num_bins must be >= 1, got 0"):
        metrics.reliability_diagram(*batch, num_bins=0)
