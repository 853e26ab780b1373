"""Embeddings: a diagonal input factor of token frequencies, never a vocabulary x vocabulary matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import reference
from tests.support import Lambda, bare_kfac, close, estimate, gradients

DOUBLE = torch.float64


def network(vocabulary: int = 6, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(vocabulary, 3, **options), nn.Tanh(), Lambda(lambda h: h.mean(1)), nn.Linear(3, 3)).to(
        DOUBLE
    )


TOKENS = torch.tensor([[0, 1, 1, 3], [3, 2, 1, 0], [4, 4, 4, 4], [2, 0, 1, 2], [1, 3, 0, 2]])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_equal_brute_force_with_a_diagonal_input_side(sharing):
    """One-hot rows make A diagonal by itself; averaged rows (reduce) do not, and only its diagonal is kept."""
    model = network()
    a, g = reference.kronecker_factors(model, TOKENS, "0", sharing=sharing)
    optimizer = bare_kfac(model, weight_sharing=sharing)
    estimate(optimizer, model, TOKENS)
    view = optimizer.curvature["0"]
    assert view.input_factor.shape == (6,)
    close(view.input_factor, a.diagonal())
    close(view.output_factor, g)
    close(view.to_dense(), torch.kron(a.diagonal().diag(), g))
    if sharing == "expand":
        assert torch.equal(a, a.diagonal().diag())


def test_input_factor_counts_tokens_per_example():
    model = network()
    optimizer = bare_kfac(model)
    estimate(optimizer, model, TOKENS)
    close(optimizer.curvature["0"].input_factor, torch.bincount(TOKENS.reshape(-1), minlength=6).double() / len(TOKENS))


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_step_equals_a_dense_solve(style):
    model = network()
    y = torch.tensor([0, 1, 2, 0, 1])
    a, g = reference.kronecker_factors(model, TOKENS, "0")
    optimizer = bare_kfac(model, damping=0.02, damping_style=style)
    F.cross_entropy(model(TOKENS), y).backward()
    v = model[0].weight.grad.T.clone()
    optimizer.precondition_gradients_()
    if style == "factored":
        expected = reference.factored_solve(a, g, 0.02, v)
    else:
        expected = reference.dense_solve(torch.kron(a, g), 0.02, v)
    close(model[0].weight.grad.T, expected)
    close(optimizer.curvature["0"].precondition(v), expected)


def test_eigenbasis_scales_equal_brute_force():
    model = network()
    g = reference.kronecker_factors(model, TOKENS, "0")[1]
    per_example, terms = reference.per_example_fisher(model, TOKENS, "0")
    qa, qg = torch.eye(6, dtype=DOUBLE), torch.linalg.eigh(g)[1]
    expected = reference.dense_eigenbasis(reference.eigenbasis_scales(per_example, terms, qa, qg), qa, qg)
    optimizer = bare_kfac(model, curvature="eigenbasis")
    estimate(optimizer, model, TOKENS)
    close(optimizer.curvature["0"].to_dense(), expected, rtol=1e-9)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_padding_index_has_no_curvature_and_is_not_trained(curvature):
    model = network(padding_idx=0)
    before = model[0].weight.detach().clone()
    optimizer = bare_kfac(model, lr=0.1, curvature=curvature)
    F.cross_entropy(model(TOKENS), torch.tensor([0, 1, 2, 0, 1])).backward()
    optimizer.step()
    assert torch.equal(model[0].weight[0], before[0])
    assert (model[0].weight[1:5] != before[1:5]).any(1).all()
    if curvature != "diagonal":
        assert optimizer.curvature["0"].input_factor[0] == 0


def test_rows_of_other_tokens_do_not_feel_the_padding_index():
    with_padding, without = network(padding_idx=0), network()
    with torch.no_grad():
        without[0].weight[0] = 0
    blocks = []
    for model in (with_padding, without):
        optimizer = bare_kfac(model)
        estimate(optimizer, model, TOKENS)
        blocks.append(optimizer.curvature["0"].input_factor[1:])
    close(*blocks)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_duplicating_every_example_changes_nothing(curvature):
    y = torch.tensor([0, 1, 2, 0, 1])
    results = []
    for copies in (1, 3):
        model = network()
        optimizer = bare_kfac(model, curvature=curvature)
        F.cross_entropy(model(TOKENS.repeat(copies, 1)), y.repeat(copies)).backward()
        optimizer.precondition_gradients_()
        results.append((optimizer.curvature["0"].to_dense(), gradients(model)["0.weight"]))
    close(results[1][0], results[0][0], rtol=1e-9)
    close(results[1][1], results[0][1], rtol=1e-9)


def test_a_large_vocabulary_needs_no_square_matrix():
    """100,000 x 100,000 in float32 would be 40 GB; the whole state stays below three times the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100_000, 4), Lambda(lambda h: h.mean(1)), nn.Linear(4, 3))
    optimizer = bare_kfac(model, factor_dtype=torch.float32, max_factor_dim=10**6)
    x = torch.randint(100_000, (4, 7))
    F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert optimizer.curvature["0"].input_factor.shape == (100_000,)

    def size(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        return sum(size(v) for v in value.values()) if isinstance(value, dict) else 0

    assert size(optimizer.state[model[0].weight]) <= 3 * model[0].weight.numel()


def test_indices_of_one_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 3)).to(DOUBLE)
    x = torch.tensor([0, 3, 3, 5])
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].to_dense(), torch.kron(a, g))


def test_token_model_with_a_loss_per_token():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 6)).to(DOUBLE)
    a, g = reference.kronecker_factors(model, TOKENS, "0")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, TOKENS)
    close(optimizer.curvature["0"].to_dense(), torch.kron(a, g))
    close(optimizer.curvature["0"].input_factor.sum(), torch.tensor(1.0, dtype=DOUBLE))


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_an_embedding_called_twice(curvature):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.embedding(x[:, :1]), self.embedding(x[:, 1:])
            return self.head(torch.tanh(torch.cat([first.mean(1), second.mean(1)], dim=1)))

    torch.manual_seed(0)
    model = Pair().to(DOUBLE)
    a, g = reference.kronecker_factors(model, TOKENS, "embedding")
    expected = torch.kron(a, g)
    if curvature == "eigenbasis":
        per_example, terms = reference.per_example_fisher(model, TOKENS, "embedding")
        qa, qg = torch.eye(6, dtype=DOUBLE), torch.linalg.eigh(g)[1]
        expected = reference.dense_eigenbasis(reference.eigenbasis_scales(per_example, terms, qa, qg), qa, qg)
    optimizer = bare_kfac(model, curvature=curvature)
    estimate(optimizer, model, TOKENS)
    close(optimizer.curvature["embedding"].to_dense(), expected, rtol=1e-9)
