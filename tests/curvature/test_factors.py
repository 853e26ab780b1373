"""Kronecker factors equal plain loops over per-example Jacobians: scale, positions, calls, terms, masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import reference
from tests.support import Lambda, Sequence, Twice, bare_kfac, close, data, estimate, mlp, pool

DOUBLE = torch.float64


def assert_factors(model: nn.Module, x: torch.Tensor, names: list[str], likelihood: str = "categorical", **options) -> None:
    """Every named layer's factors and dense block equal the reference's."""
    sharing, class_dim = options.get("weight_sharing", "expand"), options.pop("class_dim", None)
    expected = {n: reference.kronecker_factors(model, x, n, likelihood, sharing, class_dim) for n in names}
    optimizer = bare_kfac(model, likelihood=likelihood, **options)
    estimate(optimizer, model, x)
    for name, (input_factor, output_factor) in expected.items():
        view = optimizer.curvature[name]
        close(view.input_factor, input_factor)
        close(view.output_factor, output_factor)
        close(view.to_dense(), reference.dense_kronecker(input_factor, output_factor))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_factors_of_an_mlp_equal_brute_force(likelihood):
    assert_factors(mlp(), data()[0], ["0", "2"], likelihood)


def test_input_factor_is_the_mean_outer_product_over_examples():
    model, (x, _) = mlp(), data()
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    a = torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE)], 1)
    close(optimizer.curvature["0"].input_factor, a.T @ a / len(x))


def test_output_factor_of_the_last_layer_is_the_mean_output_hessian():
    model, (x, _) = mlp(), data()
    p = model(x).detach().softmax(1)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["2"].output_factor, (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0))


@pytest.mark.parametrize("name", ["0", "2"])
def test_block_is_the_exact_fisher_for_one_example(name):
    model, (x, _) = mlp(), data(batch=1)
    expected = reference.fisher_block(model, x, name)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature[name].to_dense(), expected)


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_block_is_the_exact_fisher_for_a_deep_linear_gaussian_network(name):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2)).to(DOUBLE)
    x, _ = data(batch=7)
    expected = reference.fisher_block(model, x, name, "gaussian")
    optimizer = bare_kfac(model, likelihood="gaussian")
    estimate(optimizer, model, x)
    close(optimizer.curvature[name].to_dense(), expected)


def test_gaussian_variance_divides_the_output_factor():
    from kfac_opt.likelihoods import Gaussian

    model, (x, _) = mlp(), data()
    factor = reference.kronecker_factors(model, x, "0", "gaussian")[1]
    optimizer = bare_kfac(model, likelihood=Gaussian(variance=0.25))
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].output_factor, 4 * factor)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sequence_with_one_label_per_example(sharing):
    torch.manual_seed(0)
    model = Sequence().to(DOUBLE)
    assert_factors(model, torch.randn(5, 4, 3, dtype=DOUBLE), ["inner", "outer"], weight_sharing=sharing)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolution_in_both_weight_sharing_modes(sharing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), Lambda(pool), nn.Linear(3, 3)).to(DOUBLE)
    assert_factors(model, torch.randn(3, 2, 4, 4, dtype=DOUBLE), ["0", "3"], weight_sharing=sharing)


@pytest.mark.parametrize("extra", [(2,), (2, 3)])
def test_linear_with_several_shared_dimensions(extra):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Lambda(lambda h: h.flatten(1, -2).mean(1)), nn.Linear(4, 3)).to(DOUBLE)
    assert_factors(model, torch.randn(4, *extra, 3, dtype=DOUBLE), ["0"])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sequence_with_one_label_per_token(sharing):
    """``N`` counts tokens, though the layers see ``[batch, time, features]``."""
    torch.manual_seed(0)
    model = Sequence(per_token=True).to(DOUBLE)
    if sharing == "expand":
        assert_factors(model, torch.randn(3, 4, 3, dtype=DOUBLE), ["inner", "outer"])
        return
    x = torch.randn(3, 4, 3, dtype=DOUBLE)
    expected = reference.kronecker_factors(model, x, "inner", sharing="reduce")[0]
    optimizer = bare_kfac(model, weight_sharing="reduce")
    estimate(optimizer, model, x)
    close(optimizer.curvature["inner"].input_factor, expected)


def test_a_sequence_loss_gives_the_factors_of_the_same_tokens_in_one_batch():
    torch.manual_seed(0)
    model = Sequence(per_token=True).to(DOUBLE)
    x = torch.randn(3, 4, 3, dtype=DOUBLE)
    optimizer = bare_kfac(model, factor_decay=0.0)
    blocks = []
    for batch in (x, x.reshape(12, 1, 3), x.reshape(1, 12, 3)):
        estimate(optimizer, model, batch)
        blocks.append(
            [f for n in ("inner", "outer") for f in (optimizer.curvature[n].input_factor, optimizer.curvature[n].output_factor)]
        )
    for other in blocks[1:]:
        for a, b in zip(blocks[0], other):
            close(b, a)


def test_images_have_their_classes_in_dimension_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1)).to(DOUBLE)
    assert_factors(model, torch.randn(2, 2, 3, 2, dtype=DOUBLE), ["0", "2"], class_dim=0)


def test_class_dimension_can_be_said():
    from kfac_opt.likelihoods import Categorical

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.Conv1d(4, 3, 1)).to(DOUBLE)
    x = torch.randn(2, 2, 5, dtype=DOUBLE)
    expected = reference.kronecker_factors(model, x, "0", class_dim=0)
    optimizer = bare_kfac(model, likelihood=Categorical(class_dim=1))
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].input_factor, expected[0])
    close(optimizer.curvature["0"].output_factor, expected[1])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_module_called_twice_contributes_the_rows_of_both_calls(sharing):
    torch.manual_seed(0)
    model = Twice().to(DOUBLE)
    assert_factors(model, data(5)[0], ["shared", "head"], weight_sharing=sharing)


def test_several_passes_of_one_step_are_joined_by_sums_and_counts():
    """Never a mean of means: the last micro-batch is smaller."""
    model, (x, _) = mlp(), data(11)
    expected = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    for part in x.split([4, 4, 3]):
        model(part)
    optimizer.step()
    close(optimizer.curvature["0"].input_factor, expected[0])
    close(optimizer.curvature["0"].output_factor, expected[1])


def masked_case() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [True, False, False, False]])
    return Sequence(per_token=True).to(DOUBLE), torch.randn(3, 4, 3, dtype=DOUBLE), mask


@pytest.mark.parametrize("way", ["context", "outputs"])
def test_masked_tokens_count_nowhere(way):
    model, x, mask = masked_case()
    expected = {n: reference.kronecker_factors(model, x, n, mask=mask) for n in ("inner", "outer")}
    if way == "context":
        optimizer = bare_kfac(model)
        with optimizer.masked(mask):
            model(x)
    else:
        optimizer = bare_kfac(model, outputs=lambda logits: (logits, mask))
        model(x)
    optimizer.step()
    for name, (a, g) in expected.items():
        close(optimizer.curvature[name].input_factor, a)
        close(optimizer.curvature[name].output_factor, g)


def test_what_stands_in_masked_tokens_does_not_matter():
    model, x, mask = masked_case()
    optimizer = bare_kfac(model, factor_decay=0.0)
    blocks = []
    for filler in (0.0, 100.0):
        with optimizer.masked(mask):
            model(torch.where(mask[..., None], x, filler))
        optimizer.step()
        blocks.append(optimizer.curvature["inner"].to_dense().clone())
    close(blocks[1], blocks[0])


def test_masked_pixels_count_nowhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1)).to(DOUBLE)
    x, mask = torch.randn(2, 2, 2, 3, dtype=DOUBLE), torch.rand(2, 2, 3) < 0.6
    expected = reference.kronecker_factors(model, x, "0", class_dim=0, mask=mask)
    optimizer = bare_kfac(model)
    with optimizer.masked(mask):
        model(x)
    optimizer.step()
    close(optimizer.curvature["0"].input_factor, expected[0])
    close(optimizer.curvature["0"].output_factor, expected[1])


def test_a_layer_that_was_not_used_keeps_its_average():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, use_left: bool = True) -> torch.Tensor:
            return self.left(x) if use_left else self.right(x)

    torch.manual_seed(0)
    model, (x, _) = Branches().to(DOUBLE), data()
    optimizer = bare_kfac(model, factor_decay=0.9)
    estimate(optimizer, model, x)
    before = optimizer.curvature["left"].to_dense().clone()
    model(2 * x, use_left=False)
    optimizer.step()
    assert torch.equal(optimizer.curvature["left"].to_dense(), before)
    assert optimizer.curvature["right"].to_dense().abs().sum() > 0


def test_values_are_detached_and_symmetric():
    model, (x, _) = mlp(), data()
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    for view in optimizer.curvature.values():
        for value in (view.input_factor, view.output_factor, view.to_dense()):
            assert not value.requires_grad
            close(value, value.T)


def test_factors_are_in_float32_whatever_the_model_uses():
    model, (x, _) = mlp(torch.bfloat16), data(dtype=torch.bfloat16)
    optimizer = bare_kfac(model, factor_dtype=torch.float32)
    estimate(optimizer, model, x)
    assert optimizer.curvature["0"].input_factor.dtype == torch.float32
    a = torch.cat([x.float(), torch.ones(len(x), 1)], 1)
    # products of bf16 numbers are exact in float32: only the sum of 8 of them rounds
    close(optimizer.curvature["0"].input_factor, a.T @ a / len(x), rtol=8 * torch.finfo(torch.float32).eps)


def test_a_model_that_is_itself_a_layer_has_the_empty_name():
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(4, 3).to(DOUBLE), data()
    expected = reference.kronecker_factors(model, x, "")
    optimizer = bare_kfac(model)
    assert list(optimizer.curvature) == [""]
    estimate(optimizer, model, x)
    close(optimizer.curvature[""].input_factor, expected[0])
    close(optimizer.curvature[""].output_factor, expected[1])


def test_keys_exist_from_construction_in_module_order_and_values_do_not():
    model = Twice().to(DOUBLE)
    optimizer = bare_kfac(model)
    assert list(optimizer.curvature) == ["shared", "head"]
    assert len(optimizer.curvature) == 2
    for read in ("input_factor", "output_factor"):
        with pytest.raises(RuntimeError, match="shared"):
            getattr(optimizer.curvature["shared"], read)
    with pytest.raises(RuntimeError, match="shared"):
        optimizer.curvature["shared"].to_dense()
    with pytest.raises(RuntimeError, match="shared"):
        optimizer.curvature["shared"].precondition(torch.zeros(4, 5, dtype=DOUBLE))
    with pytest.raises(KeyError):
        optimizer.curvature["nothing"]
