"""Gradient statistics against per-example gradients taken one by one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from kfac_opt.fisher import GradientMonitor, LayerGradients, gradient_statistics, symmetric_log_bins
from tests.fisher.models import make
from tests.support import close, data, mlp


def example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """``[N, P_l]`` by module name, one backward per example; all parameters under ``""``."""
    rows: dict[str, list[Tensor]] = {}
    owners = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    for index in range(len(x)):
        loss = F.cross_entropy(model(x[index : index + 1]), y[index : index + 1])
        found = torch.autograd.grad(loss, list(model.parameters()))
        for owner in dict.fromkeys(owners):
            own = [g.flatten() for g, name in zip(found, owners) if name == owner]
            rows.setdefault(owner, []).append(torch.cat(own))
        rows.setdefault("", []).append(torch.cat([g.flatten() for g in found]))
    return {name: torch.stack(parts) for name, parts in rows.items()}


def layer(norms: Tensor, projections: Tensor | None = None) -> LayerGradients:
    projections = torch.zeros(len(norms), 1) if projections is None else projections.unsqueeze(1)
    value = projections.square().mean(0)
    return LayerGradients("test", norms, torch.zeros(2), value, torch.ones(2, 1), projections)


@pytest.mark.parametrize("name", ["lenet", "twice", "attention", "recurrent"])
@pytest.mark.parametrize("tight", [False, True])
def test_norms_means_eigenpairs_and_projections_agree_with_single_gradients(name, tight, monkeypatch):
    model, x = make(name)
    x = torch.cat([x, 0.5 * x.flip(0), -x])
    y = torch.arange(len(x)) % 3
    if tight:
        monkeypatch.setattr("kfac_opt.fisher.matrix.DIRECT_SIZE", 0)
    found = gradient_statistics(model, (x, y), num_eigenpairs=2, memory_limit=10**6 if tight else 2**31)
    expected = example_gradients(model, x, y)
    assert found.num_examples == len(x)
    assert set(found.layers) == set(expected) - {""}
    for key, rows in expected.items():
        part = found.network if key == "" else found.layers[key]
        close(part.norms, rows.norm(dim=1))
        close(part.mean, rows.mean(0))
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        close(part.eigenvalues, values.flip(0)[:2])
        overlap = (part.eigenvectors * vectors.flip(1)[:, :2]).sum(0).abs()
        close(overlap, torch.ones(2, dtype=torch.float64), rtol=1e-8)  # squared error of the eigenvectors
        close(part.projections, rows @ part.eigenvectors)
        close(part.projections.square().mean(0), part.eigenvalues)
        largest = part.projections.gather(0, part.projections.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


def test_drift_and_diffusion_are_mean_and_standard_deviation_of_the_minibatch_gradient():
    model = mlp()
    x, y = data(30)
    rows = example_gradients(model, x, y)[""]
    part = gradient_statistics(model, (x, y)).network
    assert part.drift == pytest.approx(float(rows.mean(0).norm()), rel=1e-10)
    spread = (rows - rows.mean(0)).square().sum(1).mean()
    assert part.diffusion(1) == pytest.approx(float(spread.sqrt()), rel=1e-10)
    assert part.diffusion(16) == pytest.approx(float(spread.sqrt()) / 4, rel=1e-10)


def test_outliers_are_named_by_index_with_both_rules():
    x = torch.tensor([5.0, 5.1, 4.9, 5.2, 4.8, 30.0, 5.05, 9.0], dtype=torch.float64)
    part = layer(x)
    found = part.outliers()
    median = (5.05 + 5.1) / 2
    mad = ((x - median).abs().sort().values[3:5]).mean()
    assert found.median == pytest.approx(median)
    assert found.mad == pytest.approx(float(mad))
    assert found.threshold == pytest.approx(median + 10 * float(mad))
    assert found.indices.tolist() == [5, 7]  # the largest first
    assert len(found) == 2
    shifted = layer(x + 100)
    assert shifted.outliers().indices.tolist() == [5, 7]
    assert len(part.outliers("uncentered")) == 8  # the published rule: all of them, for 5 > 10 MAD
    assert part.outliers("uncentered", factor=100.0).indices.tolist() == [5]


def test_a_zero_mad_is_undefined_and_flagged():
    found = layer(torch.tensor([1.0, 1.0, 1.0, 50.0])).outliers()
    assert found.undefined
    assert math.isnan(found.threshold)
    assert len(found) == 0
    with pytest.raises(ValueError, match="rule must be 'centered' or 'uncentered', got 'mad'"):
        layer(torch.ones(3)).outliers("mad")


def test_trimmed_eigenvalue_drops_the_largest_tenth():
    a = torch.tensor([0.0, 1, -1, 2, -2, 1, 1, -1, 2, -20, 0.05, 0.01, 3, 1, 1, -1, 1, 1, 10, 0.5], dtype=torch.float64)
    part = layer(torch.ones(20), a)
    kept = a.square().sort().values[:18]
    assert part.trimmed_eigenvalue() == pytest.approx(float(kept.mean()))
    assert part.trimmed_eigenvalue(share=0.0) == pytest.approx(float(a.square().mean()))
    assert part.small_share() == pytest.approx(3 / 20)
    limit = 0.1 * float(a.square().mean().sqrt())
    assert part.small_share(relative=True) == pytest.approx(float((a.abs() < limit).double().mean()))
    assert part.peak_ratio() == pytest.approx(20.0 / 1.0)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 1.0"):
        part.trimmed_eigenvalue(share=1.0)


def test_histogram_bins_are_fixed_and_hold_every_projection():
    edges = symmetric_log_bins(-2, 2, 1)
    assert edges.tolist() == pytest.approx([-100, -10, -1, -0.1, -0.01, 0.01, 0.1, 1, 10, 100])
    a = torch.tensor([0.0, 0.005, -0.005, 0.05, -5.0, 1e6, -1e6, 50.0], dtype=torch.float64)
    counts = layer(torch.ones(8), a).histogram(edges)
    assert counts.tolist() == [1, 0, 1, 0, 0, 3, 1, 0, 0, 1, 1]


def test_summary_has_plain_numbers_for_every_layer():
    model = mlp()
    found = gradient_statistics(model, data(20))
    summary = found.summary(batch_size=4)
    assert set(summary) == {"(network)", "0", "2"}
    assert summary["0"]["outliers"] == len(found.layers["0"].outliers())
    assert summary["(network)"]["diffusion"] == pytest.approx(found.network.diffusion(4))
    assert all(isinstance(value, float) for part in summary.values() for value in part.values())


def test_monitor_in_the_loop_and_attached_measure_the_same_and_change_nothing():
    x, y = data(20)

    def run(mode: str) -> tuple[list, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
        optimizer = KFAC(model, lr=0.05)
        monitor = GradientMonitor(model, (x, y), interval=2)
        handle = monitor.attach(optimizer) if mode == "attached" else None
        for step in range(1, 6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if mode == "called":
                monitor(step)
        if handle is not None:
            handle.remove()
            optimizer.zero_grad()
            optimizer.step()
        optimizer.detach()
        assert model.training
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return monitor.records, weights

    called, weights = run("called")
    attached, _ = run("attached")
    _, alone = run("none")
    assert torch.equal(weights, alone)
    assert [step for step, _ in called] == [step for step, _ in attached] == [2, 4]
    for (_, left), (_, right) in zip(called, attached):
        assert torch.equal(left.network.norms, right.network.norms)
    assert not torch.equal(called[0][1].network.norms, called[1][1].network.norms)


def test_monitor_hands_statistics_to_the_callback_instead_of_keeping_them():
    seen = []
    monitor = GradientMonitor(mlp(), data(10), interval=3, record=lambda step, found: seen.append((step, found.summary())))
    assert monitor(0) is not None
    assert monitor(1) is None
    assert [step for step, _ in seen] == [0]
    assert monitor.records == []


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_eigenpairs must be >= 1, got 0"):
        gradient_statistics(mlp(), data(), num_eigenpairs=0)
    with pytest.raises(ValueError, match="interval must be >= 1 optimizer steps, got 0"):
        GradientMonitor(mlp(), data(), interval=0)
    with pytest.raises(ValueError, match=r"targets are NoneType.*Give \(inputs, targets\) pairs"):
        gradient_statistics(mlp(), data()[0])
