"""Likelihoods: losses against torch's, output Hessians against autograd, sampling against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from kfac_opt.likelihoods import Bernoulli, Categorical, Gaussian, make_likelihood, output_gradients

DOUBLE = torch.float64
ROUNDING = 1e-13  # eps (2e-16) times fewer than 1e2 additions of numbers of order one


def outputs_for(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


LIKELIHOODS = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian(variance=0.7)}


def one_target(name: str) -> torch.Tensor:
    return torch.tensor([2]) if name == "categorical" else torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=DOUBLE)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_exact_columns_are_a_root_of_the_hessian_of_the_loss(name):
    likelihood, f = LIKELIHOODS[name], outputs_for(1, 4)
    hessian = torch.autograd.functional.hessian(lambda z: likelihood.loss(z, one_target(name)), f).reshape(4, 4)
    columns = list(output_gradients(likelihood, f, kind="exact", num_labels=1, mask=None, generator=None))
    root = torch.cat(columns).T
    torch.testing.assert_close(root @ root.T, hessian, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_label_gradients_are_the_gradients_of_the_loss(name):
    likelihood, f = LIKELIHOODS[name], outputs_for(1, 4).requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.loss(f, one_target(name)), f)
    actual = likelihood.label_gradients(f.detach(), one_target(name))
    torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


def test_categorical_root_needs_one_column_less_than_classes():
    columns = list(output_gradients(Categorical(), outputs_for(2, 5), kind="exact", num_labels=1, mask=None, generator=None))
    assert len(columns) == 4


@pytest.mark.parametrize("logits", [[0.0, -800.0, -900.0], [800.0, 0.0, 0.0], [0.0, 0.0, 800.0], [-800.0, -800.0, 0.0]])
def test_categorical_root_is_finite_and_right_when_a_tail_has_no_mass(logits):
    f = torch.tensor([logits], dtype=DOUBLE)
    root = torch.cat(list(output_gradients(Categorical(), f, kind="exact", num_labels=1, mask=None, generator=None))).T
    p = f[0].softmax(0)
    torch.testing.assert_close(root @ root.T, torch.diag(p) - torch.outer(p, p), rtol=ROUNDING, atol=ROUNDING)


def test_categorical_score_has_mean_zero_and_the_hessian_as_second_moment_over_all_labels():
    f = outputs_for(1, 4)
    p = f[0].softmax(0)
    scores = torch.cat([Categorical().label_gradients(f, torch.tensor([y])) for y in range(4)])
    torch.testing.assert_close(p @ scores, torch.zeros(4, dtype=DOUBLE), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(scores.T @ (p[:, None] * scores), torch.diag(p) - torch.outer(p, p), rtol=ROUNDING, atol=ROUNDING)


def test_bernoulli_score_has_the_hessian_as_second_moment_over_all_labels():
    f = outputs_for(1, 3)
    p, total = f[0].sigmoid(), torch.zeros(3, 3, dtype=DOUBLE)
    for labels in itertools.product([0.0, 1.0], repeat=3):
        y = torch.tensor([labels], dtype=DOUBLE)
        probability = torch.where(y[0] == 1, p, 1 - p).prod()
        score = Bernoulli().label_gradients(f, y)
        total += probability * score.T @ score
    torch.testing.assert_close(total, torch.diag(p * (1 - p)), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_gradients_have_the_hessian_as_second_moment(name):
    likelihood, f, draws = LIKELIHOODS[name], outputs_for(1, 4), 20000
    sampled = likelihood.sample_gradients(f.expand(draws, 4), torch.Generator().manual_seed(1))
    hessian = torch.autograd.functional.hessian(lambda z: likelihood.loss(z, one_target(name)), f).reshape(4, 4)
    products = torch.einsum("ni,nj->nij", sampled, sampled)
    four_errors = 4 * products.std(0) / draws**0.5 + ROUNDING
    assert ((products.mean(0) - hessian).abs() <= four_errors).all()


def test_several_labels_average_and_are_not_divided_twice():
    f, draws, m = outputs_for(1, 4).expand(5000, 4), 5000, 4
    generator = torch.Generator().manual_seed(1)
    passes = list(output_gradients(Categorical(), f, kind="mc", num_labels=m, mask=None, generator=generator))
    assert len(passes) == m
    trace = sum((g**2).sum(1) for g in passes)  # per example, all labels of one estimate
    p = f[0].softmax(0)
    expected = 1 - (p**2).sum()
    assert (trace.mean() - expected).abs() <= 4 * trace.std() / draws**0.5


def test_sampling_uses_only_the_given_generator():
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(9)
        draws.append([k.sample_gradients(outputs_for(6, 4), generator) for k in LIKELIHOODS.values()])
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*draws))


def test_categorical_loss_is_cross_entropy_in_every_layout():
    y2, y3, y4 = torch.randint(5, (3,)), torch.randint(5, (3, 7)), torch.randint(5, (3, 2, 4))
    f2, f3, f4 = outputs_for(3, 5), outputs_for(3, 7, 5), outputs_for(3, 5, 2, 4)
    torch.testing.assert_close(Categorical().loss(f2, y2), F.cross_entropy(f2, y2))
    torch.testing.assert_close(Categorical().loss(f3, y3), F.cross_entropy(f3.reshape(-1, 5), y3.reshape(-1)))
    torch.testing.assert_close(Categorical().loss(f4, y4), F.cross_entropy(f4, y4))
    torch.testing.assert_close(Categorical(class_dim=1).loss(f3.mT, y3), F.cross_entropy(f3.mT, y3))


def test_ignored_targets_are_left_out_of_the_categorical_loss():
    f, y = outputs_for(2, 3, 5), torch.tensor([[1, -100, 2], [0, 4, -100]])
    torch.testing.assert_close(Categorical().loss(f, y), F.cross_entropy(f.reshape(-1, 5), y.reshape(-1)))
    zero = y.clamp_min(0)
    kept = zero != 0
    torch.testing.assert_close(Categorical(ignore_index=0).loss(f, zero), F.cross_entropy(f[kept], zero[kept]))


def test_bernoulli_and_gaussian_losses_sum_over_outputs_and_average_over_examples():
    f, y = outputs_for(3, 4), torch.rand(3, 4, dtype=DOUBLE)
    torch.testing.assert_close(Bernoulli().loss(f, y), 4 * F.binary_cross_entropy_with_logits(f, y))
    torch.testing.assert_close(Gaussian(variance=0.5).loss(f, y), 4 * F.mse_loss(f, y))


def test_number_of_terms_is_read_off_the_outputs():
    assert Categorical().num_terms(outputs_for(3, 5)) == 3
    assert Categorical().num_terms(outputs_for(3, 7, 5)) == 21
    assert Categorical().num_terms(outputs_for(3, 5, 2, 4)) == 24
    assert Categorical(class_dim=1).num_terms(outputs_for(3, 5, 7)) == 21
    assert Categorical().num_terms(outputs_for(2, 3, 5), torch.tensor([[True, True, False], [True, False, False]])) == 3
    assert Bernoulli().num_terms(outputs_for(3, 5)) == 3
    assert Gaussian().num_terms(outputs_for(3, 5, 2)) == 3


def test_masked_terms_get_no_output_gradient():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    for kind in ("mc", "exact"):
        generator = torch.Generator().manual_seed(0)
        for g in output_gradients(Categorical(), outputs_for(2, 3, 5), kind=kind, num_labels=2, mask=mask, generator=generator):
            assert (g[~mask] == 0).all()
            assert (g[mask].abs().sum(-1) > 0).any()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_predictive_is_the_mean_of_the_target(name):
    f = outputs_for(2, 4)
    expected = {"categorical": f.softmax(-1), "bernoulli": f.sigmoid(), "gaussian": f}[name]
    torch.testing.assert_close(LIKELIHOODS[name].predictive(f), expected)


@pytest.mark.parametrize("likelihood", [Categorical(class_dim=1, ignore_index=7), Bernoulli(), Gaussian(variance=0.3)])
def test_description_builds_the_same_likelihood(likelihood):
    again = make_likelihood(likelihood.describe())
    assert type(again) is type(likelihood)
    assert vars(again) == vars(likelihood)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"bernoulli.*categorical.*gaussian.*'softmax'"):
        make_likelihood("softmax")


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan")])
def test_gaussian_variance_must_be_positive(variance):
    with pytest.raises(ValueError, match=r"variance must be > 0"):
        Gaussian(variance=variance)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (torch.zeros(4), r"\[4\].*\[batch, classes\].*bernoulli.*gaussian"),
        (torch.zeros(4, 1), r"single class.*bernoulli"),
        (torch.zeros(4, 3, dtype=torch.long), r"torch.int64.*floating point.*outputs="),
        ({"logits": torch.zeros(4, 3)}, r"dict.*outputs="),
    ],
)
def test_impossible_categorical_outputs_are_refused_with_the_remedy(outputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Categorical().check(outputs)


def test_a_class_dimension_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"class_dim=3.*\[4, 3\]"):
        Categorical(class_dim=3).check(torch.zeros(4, 3))


@pytest.mark.parametrize("mask", [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)])
def test_a_mask_of_the_wrong_shape_or_type_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask.*torch.bool of shape \[2, 3\]"):
        list(output_gradients(Categorical(), outputs_for(2, 3, 5), kind="exact", num_labels=1, mask=mask, generator=None))


def test_output_gradients_of_other_losses_contradict_the_categorical_likelihood():
    f = outputs_for(6, 4).requires_grad_()
    target = torch.rand(6, 4, dtype=DOUBLE)
    (squared,) = torch.autograd.grad(F.mse_loss(f, target), f)
    (smoothed,) = torch.autograd.grad(F.cross_entropy(f, torch.randint(4, (6,)), label_smoothing=0.1), f)
    assert Categorical().contradiction(f, squared) is not None
    assert Categorical().contradiction(f, smoothed) is None
    assert Gaussian().contradiction(f, smoothed) is not None
    assert Bernoulli().contradiction(f, smoothed) is not None
    assert Gaussian().contradiction(f, squared) is None


@pytest.mark.parametrize("scale", [1.0, 1 / 32, 2.0**16])
def test_the_scale_of_the_users_loss_is_read_off_its_output_gradient(scale):
    f = outputs_for(32, 4).requires_grad_()
    (g,) = torch.autograd.grad(scale * F.cross_entropy(f, torch.randint(4, (32,)), reduction="sum"), f)
    assert Categorical().gradient_scale(f, g) == pytest.approx(scale, rel=1e-12)
    (g,) = torch.autograd.grad(
        scale * F.binary_cross_entropy_with_logits(f, torch.rand(32, 4).gt(0.5).double(), reduction="sum"), f
    )
    assert Bernoulli().gradient_scale(f, g) == pytest.approx(scale, rel=1e-12)
    assert Gaussian().gradient_scale(f, g) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 1000])
@pytest.mark.parametrize("labels", ["likely", "unlikely", "random"])
def test_saturated_logits_leave_rounding_and_no_contradiction(dtype, classes, labels):
    """Beside a certain label the gradient of a cross-entropy is rounding errors, or has underflown: no sum to judge by."""
    for size in (1, 20, 50, 1e2, 1e4):
        for seed, batch in itertools.product(range(3), (1, 32)):
            f = (torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
            targets = {"likely": f.argmax(1), "unlikely": f.argmin(1)}.get(labels, torch.arange(batch) % classes)
            f.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(f, targets), f)
            if f.isfinite().all() and g.isfinite().all():
                assert Categorical().contradiction(f.detach(), g) is None, (size, seed, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_squared_error_contradicts_the_categorical_likelihood_in_every_precision(dtype):
    f = outputs_for(32, 4).to(dtype).requires_grad_()
    (g,) = torch.autograd.grad(F.mse_loss(f, torch.rand(32, 4).to(dtype)), f)
    assert Categorical().contradiction(f.detach(), g) is not None


def test_the_gaussian_loss_refuses_to_pair_every_output_with_every_target():
    with pytest.raises(ValueError, match=r"outputs are \[5, 1\] and the targets \[5\].*view_as"):
        Gaussian().loss(torch.zeros(5, 1), torch.ones(5))


@pytest.mark.parametrize("size", [1e39, 1e300])
def test_labels_are_drawn_from_logits_beyond_single_precision(size: float):
    logits = torch.tensor([[size, 0.0, -size], [0.0, 0.0, 1.0]], dtype=torch.float64)
    labels = Categorical().sample(logits.expand(50, 2, 3), torch.Generator().manual_seed(0))
    assert set(labels[:, 0].tolist()) == {0}
    assert set(labels[:, 1].tolist()) == {0, 1, 2}
