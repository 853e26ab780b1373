"""Variance of the Fisher estimators against the enumeration of all labels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt.fisher import (
    FisherMatrix,
    decay_for,
    effective_labels,
    entrywise_variance,
    estimator_variance,
)
from tests.fisher.brute import jacobians, one_output
from tests.fisher.models import make
from tests.support import close, data, mlp


def small(activation: type[nn.Module] = nn.Tanh, classes: int = 3) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 2), activation(), nn.Linear(2, classes)).double()


def hessian_of(model: nn.Module, x: Tensor, label: int) -> Tensor:
    """Hessian ``[P, P]`` of the negative log-probability of the label, by double differentiation."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        values = {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes)}
        return F.cross_entropy(torch.func.functional_call(model, values, x.unsqueeze(0)), torch.tensor([label]))

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat)


def enumerated(model: nn.Module, inputs: Tensor, estimator: str, num_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[P, P]``, entrywise variance ``[P, P]`` and covariance ``[P², P²]`` over all labellings of the inputs.

    Each input has ``num_labels`` labels; the estimate is the mean over inputs and labels.
    """
    single: list[list[Tensor]] = []
    probabilities = []
    for index, jacobian in enumerate(jacobians(model, inputs)):
        logits = one_output(model, inputs, index)
        p = logits.softmax(-1)
        probabilities.append(p)
        values = []
        for label in range(len(p)):
            if estimator == "first":
                score = (F.one_hot(torch.tensor(label), len(p)) - p) @ jacobian
                values.append(torch.outer(score, score))
            else:
                values.append(hessian_of(model, inputs[index], label))
        single.append(values)
    slots = [index for index in range(len(inputs)) for _ in range(num_labels)]
    estimates, weights = [], []
    for labelling in itertools.product(*[range(len(probabilities[index])) for index in slots]):
        estimates.append(sum(single[index][label] for index, label in zip(slots, labelling)) / len(slots))
        weights.append(math.prod(float(probabilities[index][label]) for index, label in zip(slots, labelling)))
    stacked, weight = torch.stack(estimates), torch.tensor(weights, dtype=torch.float64)
    assert float(weight.sum()) == pytest.approx(1.0)
    mean = torch.einsum("k,kij->ij", weight, stacked)
    centred = (stacked - mean).flatten(1)
    covariance = torch.einsum("k,ki,kj->ij", weight, centred, centred)
    return mean, covariance.diagonal().reshape(mean.shape), covariance


CASES = [(1, 1), (1, 3), (2, 1), (2, 2)]


@pytest.mark.parametrize(("inputs", "labels"), CASES)
@pytest.mark.parametrize("estimator", ["first", "second"])
def test_all_norms_are_those_of_the_enumerated_labels(inputs, labels, estimator):
    model = small()
    x, _ = data(inputs, features=2)
    mean, variance, covariance = enumerated(model, x, estimator, labels)
    close(mean, FisherMatrix(model, x).to_dense())
    found = estimator_variance(model, x, num_labels=labels)
    whole = found if estimator == "first" else found.second
    assert whole.total_variance == pytest.approx(float(variance.sum()), rel=1e-10)
    assert whole.covariance_norm == pytest.approx(float(covariance.norm()), rel=1e-10)
    assert whole.covariance_norm <= whole.bound
    assert found.fisher_norm == pytest.approx(float(mean.norm()), rel=1e-10)
    close(entrywise_variance(model, x, num_labels=labels, estimator=estimator), variance)
    size = len(mean)
    for name, where in FisherMatrix(model, x).block_slices.items():
        part = found.layers[name] if estimator == "first" else found.layers[name].second
        block = covariance.reshape(size, size, size, size)[where, where, where, where]
        assert part.total_variance == pytest.approx(float(variance[where, where].sum()), rel=1e-10)
        assert part.covariance_norm == pytest.approx(float(block.norm()), rel=1e-10)
        assert part.covariance_norm <= part.bound * (1 + 1e-10)


def test_bounds_are_the_products_of_the_enumerated_norms():
    model = small()
    x, _ = data(1, features=2)
    p = model(x)[0].softmax(-1).detach()
    jacobian = jacobians(model, x)[0]
    unit = torch.eye(3, dtype=torch.float64) - p
    fourth = torch.einsum("y,ya,yb,yc,yd->abcd", p, unit, unit, unit, unit)
    hessian = torch.diag(p) - torch.outer(p, p)
    label_norm = (fourth - torch.einsum("ab,cd->abcd", hessian, hessian)).norm()
    found = estimator_variance(model, x)
    assert found.bound == pytest.approx(float(jacobian.norm() ** 4 * label_norm), rel=1e-10)
    logits = [torch.stack([hessian_of(model, x[0], label)]) for label in range(3)]
    # the Hessian of a logit: that of the loss differs between labels by minus the Hessian of the logit
    curvature = [sum(p[a] * logits[a][0] for a in range(3)) - logits[label][0] for label in range(3)]
    mean = FisherMatrix(model, x).to_dense()
    products = torch.stack(curvature)
    assert found.second.bound >= found.second.covariance_norm
    centred = torch.einsum("ab,aij,bij->", hessian, products, products)
    assert found.second.total_variance == pytest.approx(float(centred), rel=1e-10)
    close(sum(p[a] * logits[a][0] for a in range(3)), mean)


def test_covariance_tensor_has_the_fourth_moment_form():
    model = small()
    x, _ = data(1, features=2)
    _, _, covariance = enumerated(model, x, "first", 2)
    p, jacobian = model(x)[0].softmax(-1).detach(), jacobians(model, x)[0]
    unit = torch.eye(3, dtype=torch.float64) - p
    fourth = torch.einsum("y,ya,yb,yc,yd->abcd", p, unit, unit, unit, unit)
    hessian = torch.diag(p) - torch.outer(p, p)
    core = fourth - torch.einsum("ab,cd->abcd", hessian, hessian)
    expected = torch.einsum("abcd,ai,bj,ck,dl->ijkl", core, jacobian, jacobian, jacobian, jacobian) / 2
    close(covariance, expected.reshape(covariance.shape))


def test_relu_layers_have_no_second_variance_of_their_own():
    model = small(nn.ReLU)
    x, _ = data(2, features=2)
    found = estimator_variance(model, x)
    assert all(layer.second.total_variance == 0.0 for layer in found.layers.values())
    assert found.second.total_variance > 1e-3
    curved = estimator_variance(small(nn.Tanh), x)
    assert curved.layers["0"].second.total_variance > 1e-3
    assert curved.layers["2"].second.total_variance == 0.0  # the logits are linear in the last layer


def test_variance_falls_with_the_number_of_labels_and_inputs():
    model = mlp()
    x, _ = data(4)
    one, four = estimator_variance(model, x), estimator_variance(model, x, num_labels=4)
    assert four.total_variance == pytest.approx(one.total_variance / 4)
    assert four.covariance_norm == pytest.approx(one.covariance_norm / 4)
    assert four.second.bound == pytest.approx(one.second.bound / 4)
    twice = estimator_variance(model, torch.cat([x, x]))
    assert twice.total_variance == pytest.approx(one.total_variance / 2)
    assert twice.covariance_norm == pytest.approx(one.covariance_norm / 2)
    assert twice.second.covariance_norm == pytest.approx(one.second.covariance_norm / 2)
    assert twice.fisher_norm == pytest.approx(one.fisher_norm)


@pytest.mark.parametrize("name", ["lenet", "residual", "attention", "tied", "twice", "recurrent"])
def test_unusual_models_agree_with_dense_formulas(name):
    model, x = make(name)
    x = x[:3]
    found = estimator_variance(model, x, second="skip")
    assert found.second is None
    total, covariance, count = 0.0, [], len(x)
    for index, jacobian in enumerate(jacobians(model, x)):
        p = one_output(model, x, index).softmax(-1)
        scores = jacobian - p @ jacobian
        gram = (scores @ scores.T) ** 2
        total += float(p @ gram.diagonal() - p @ gram @ p)
        covariance.append((p, scores))
    assert found.total_variance == pytest.approx(total / count**2, rel=1e-9)
    square = 0.0
    for (p, s), (q, t) in itertools.product(covariance, covariance):
        gram = (s @ t.T) ** 2
        inner = gram - (gram @ q)[:, None] - (gram.T @ p)[None, :] + p @ gram @ q
        square += float(torch.einsum("a,ab,b->", p, inner**2, q))
    assert found.covariance_norm == pytest.approx(math.sqrt(square) / count**2, rel=1e-9)
    assert found.fisher_norm == pytest.approx(float(FisherMatrix(model, x).to_dense().norm()), rel=1e-9)


def test_chunks_and_recomputation_do_not_change_the_numbers():
    model, x = make("lenet")
    x = torch.cat([x, -x, 0.3 * x])
    whole = estimator_variance(model, x, num_labels=2, second="skip")
    for limit in (1_000_000, 200_000):
        parts = estimator_variance(model, x, num_labels=2, second="skip", memory_limit=limit)
        for left, right in ((whole, parts), (whole.layers["3"], parts.layers["3"])):
            assert left.total_variance == pytest.approx(right.total_variance, rel=1e-10)
            assert left.covariance_norm == pytest.approx(right.covariance_norm, rel=1e-10)
    small_model, (points, _) = mlp(), data(3)
    exact = estimator_variance(small_model, points).second
    tight = estimator_variance(small_model, points, memory_limit=100_000).second
    assert tight.total_variance == pytest.approx(exact.total_variance, rel=1e-10)
    assert tight.covariance_norm == pytest.approx(exact.covariance_norm, rel=1e-10)
    loader = [(x[:4], None), (x[4:], None)]
    assert estimator_variance(model, loader, second="skip").covariance_norm == pytest.approx(
        estimator_variance(model, x, second="skip").covariance_norm, rel=1e-10
    )


def test_sampled_pairs_estimate_the_norms_without_bias(monkeypatch):
    model, x = make("lenet")
    x = torch.cat([x, -x, 0.3 * x])
    loader = [(x[start : start + 2], None) for start in range(0, 15, 2)]  # eight chunks
    everything = estimator_variance(model, loader, second="skip", pairs="all")
    assert not everything.sampled_pairs
    monkeypatch.setattr("kfac_opt.fisher.variance.SAMPLED_TILES", 4)

    def sampled(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return estimator_variance(model, loader, second="skip", pairs="sampled", generator=generator)

    runs = [sampled(seed) for seed in range(30)]
    assert all(run.sampled_pairs for run in runs)
    assert sampled(3) == runs[3]
    for run in runs:  # what needs single inputs only stays exact
        assert run.total_variance == pytest.approx(everything.total_variance, rel=1e-12)
        assert run.bound == pytest.approx(everything.bound, rel=1e-12)
    for name in ("covariance_norm", "fisher_norm"):
        squares = torch.tensor([getattr(run, name) ** 2 for run in runs], dtype=torch.float64)
        assert len(squares.unique()) > 20
        assert abs(float(squares.mean()) - getattr(everything, name) ** 2) < 4 * float(squares.std()) / math.sqrt(30)
    monkeypatch.setattr("kfac_opt.fisher.variance.SAMPLED_TILES", 1000)  # more than there are: all are taken
    assert sampled(0) == everything


def test_pairs_are_sampled_by_default_beyond_two_thousand_inputs(monkeypatch):
    model, (x, _) = mlp(), data(6)
    monkeypatch.setattr("kfac_opt.fisher.variance.ALL_PAIRS", 5)
    monkeypatch.setattr("kfac_opt.fisher.variance.SAMPLED_TILES", 2)
    batches = [(x[:2], None), (x[2:4], None), (x[4:], None)]
    assert estimator_variance(model, batches, second="skip").sampled_pairs
    assert not estimator_variance(model, batches, second="skip", pairs="all").sampled_pairs
    assert not estimator_variance(model, batches[:2], second="skip").sampled_pairs


def test_probes_estimate_the_second_variance_without_bias_of_its_total():
    model = mlp()
    x, _ = data(3)
    exact = estimator_variance(model, x, second="exact")
    assert exact.second.num_probes is None
    runs = [
        estimator_variance(model, x, second="probes", num_probes=20, generator=torch.Generator().manual_seed(seed)).second
        for seed in range(10)
    ]
    assert runs[0].num_probes == 20
    totals = torch.tensor([run.total_variance for run in runs], dtype=torch.float64)
    assert len(totals.unique()) == 10
    error = float(totals.std()) / math.sqrt(10)
    assert abs(float(totals.mean()) - exact.second.total_variance) < 4 * error
    again = estimator_variance(model, x, second="probes", num_probes=20, generator=torch.Generator().manual_seed(0))
    assert again.second == runs[0]


def test_one_bernoulli_output_is_a_softmax_of_two_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    class TwoClasses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(self.net(x), (1, 0))

    x, _ = data(3)
    left, right = estimator_variance(model, x, "bernoulli", 2), estimator_variance(TwoClasses(), x, num_labels=2)
    for one, two in ((left, right), (left.second, right.second), (left.layers["0"], right.layers["net.0"])):
        assert one.total_variance == pytest.approx(two.total_variance, rel=1e-10)
        assert one.covariance_norm == pytest.approx(two.covariance_norm, rel=1e-10)
    close(entrywise_variance(model, x, "bernoulli"), entrywise_variance(TwoClasses(), x))
    assert left.fisher_norm == pytest.approx(float(FisherMatrix(model, x, "bernoulli").to_dense().norm()), rel=1e-10)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_spectral_norm_of_every_layer_is_below_the_product_of_the_weights_above(activation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        activation(),
        nn.Flatten(),
        nn.Sequential(nn.Linear(4, 5), activation()),
        nn.Linear(5, 3),
    ).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    found = estimator_variance(model, x, second="skip")
    slices = FisherMatrix(model, x).block_slices
    norms = [torch.linalg.matrix_norm(j[:, where], ord=2) for where in slices.values() for j in jacobians(model, x)]
    by_layer = torch.stack(norms).reshape(len(slices), len(x)).max(1).values
    for norm, layer in zip(by_layer, found.layers.values()):
        assert layer.spectral_norm == pytest.approx(float(norm), rel=1e-10)
        assert layer.spectral_norm <= layer.spectral_bound * (1 + 1e-10)
    last = found.layers["7"]
    assert last.spectral_bound == pytest.approx(last.spectral_norm, rel=1e-10)  # nothing lies above
    dense = torch.autograd.functional.jacobian(model[3], torch.zeros(1, 3, 2, 2, dtype=torch.float64))
    gain = torch.linalg.matrix_norm(dense.reshape(4, 12), ord=2)  # the map, not the reshaped kernel
    inputs = F.unfold(x, 3, padding=1, stride=2)
    rows = torch.linalg.matrix_norm(inputs, ord=2).max()
    above = gain * torch.linalg.matrix_norm(model[6][0].weight, ord=2) * torch.linalg.matrix_norm(model[7].weight, ord=2)
    assert found.layers["0"].spectral_bound == pytest.approx(float((rows * above).detach()), rel=1e-4)  # tolerance of the norm


def test_models_that_are_no_chain_have_no_spectral_bound():
    for name in ("residual", "twice", "attention"):
        model, x = make(name)
        layers = estimator_variance(model, x, second="skip").layers
        assert all(layer.spectral_bound is None for layer in layers.values())
    x, _ = data(2)
    steep = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)).double()
    assert estimator_variance(steep, x, second="skip").layers["0"].spectral_bound is None
    layer = nn.Linear(4, 3).double()
    assert estimator_variance(nn.Sequential(nn.Linear(4, 4).double(), layer), x).layers["0"].spectral_bound > 0
    repeated = nn.Linear(4, 4).double()
    twice = nn.Sequential(repeated, repeated, layer)
    assert all(part.spectral_bound is None for part in estimator_variance(twice, x, second="skip").layers.values())


def test_effective_labels_follow_from_the_weights_of_the_average():
    for decay, labels in ((0.0, 1), (0.95, 1), (0.8, 3)):
        weights = (1 - decay) * torch.tensor([decay], dtype=torch.float64) ** torch.arange(2000)
        assert effective_labels(labels, decay) == pytest.approx(labels / float(weights.square().sum()))
        assert decay_for(effective_labels(labels, decay), labels) == pytest.approx(decay, abs=1e-12)
    assert decay_for(0.5) == 0.0


def test_relative_errors_and_needed_labels_are_consistent():
    model = mlp()
    x, _ = data(4)
    found = estimator_variance(model, x, num_labels=3, second="skip")
    mean, variance, _ = enumerated(small(), x[:1, :2], "first", 1)
    tiny = estimator_variance(small(), x[:1, :2], second="skip")
    assert tiny.relative_error() == pytest.approx(math.sqrt(float(variance.sum())) / float(mean.norm()), rel=1e-9)
    assert found.relative_error(4) == pytest.approx(found.relative_error() / 2)
    assert found.relative_error(1, 0.6) == pytest.approx(found.relative_error() / 2)
    needed = found.labels_for(0.1)
    assert found.relative_error(1, decay_for(needed)) == pytest.approx(0.1)
    text = found.describe(label_samples=2, factor_decay=0.9)
    assert "38 labels per input" in text
    assert "'0': " in text
    assert "10 % needs" in text


def test_bad_arguments_are_named():
    model, (x, _) = mlp(), data(3)
    many = torch.randn(400, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"inner products of the Hessians of 400 inputs × 3 logits need 33.0 MiB.*second='skip'"):
        estimator_variance(model, many, memory_limit=2**24)
    custom, points = make("custom_function")
    with pytest.raises(ValueError, match=r"second derivatives of this model cannot be taken.*second='skip'"):
        estimator_variance(custom, points)
    assert estimator_variance(custom, points, second="skip").total_variance > 0
    cases = [
        (dict(num_labels=0), "num_labels must be >= 1, got 0"),
        (dict(second="both"), "second must be 'auto', 'exact', 'probes' or 'skip', got 'both'"),
        (dict(num_probes=0), "num_probes must be >= 1, got 0"),
        (dict(pairs="some"), "pairs must be 'auto', 'all' or 'sampled', got 'some'"),
        (dict(likelihood="gaussian"), "the gaussian likelihood has no finite set of labels"),
        (dict(likelihood="bernoulli"), r"outputs of shape \[3, 3\] hold several labels per input, expected \[batch\]"),
        (dict(outputs=lambda z: (z, torch.ones(len(z), dtype=torch.bool))), "masks are not supported"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            estimator_variance(model, x, **arguments)
    with pytest.raises(ValueError, match=r"hold several labels per input, expected \[batch, classes\]"):
        estimator_variance(nn.Linear(4, 3).double(), torch.randn(3, 2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="estimator must be 'first' or 'second', got 'third'"):
        entrywise_variance(model, x, estimator="third")
    with pytest.raises(ValueError, match="num_labels must be >= 1, got 0"):
        entrywise_variance(model, x, num_labels=0)
    with pytest.raises(ValueError, match=r"a matrix of 43 parameters needs 57.8 KiB, memory_limit is 48.8 KiB"):
        entrywise_variance(model, x, memory_limit=50_000)
    with pytest.raises(ValueError, match=r"along one direction need 105.5 KiB, memory_limit is 97.7 KiB.*second='skip'"):
        estimator_variance(
            nn.Linear(249, 3).double(), torch.randn(2, 249, dtype=torch.float64), memory_limit=100_000, second="exact"
        )
    with pytest.raises(ValueError, match="label_samples must be >= 1, got 0"):
        effective_labels(0, 0.5)
    with pytest.raises(ValueError, match=r"factor_decay must be in \[0, 1\), got 1.0"):
        effective_labels(1, 1.0)
    with pytest.raises(ValueError, match=r"relative_error must be > 0, got 0.0"):
        estimator_variance(model, x, second="skip").labels_for(0.0)
    with pytest.raises(ValueError, match=r"estimator_variance: 'norm' \(BatchNorm2d\)"):
        estimator_variance(make("residual")[0].train(), make("residual")[1])
