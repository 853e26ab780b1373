"""FisherMatrix against brute-force per-example Jacobians in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from kfac_opt.fisher import FisherMatrix, gradient_statistics
from kfac_opt.likelihoods import Bernoulli, Categorical, Gaussian
from tests.fisher.brute import block_diagonal, exact_fisher, label_fisher
from tests.fisher.models import NAMES, TokenModel, make
from tests.support import Sequence, close, data, mlp

ROUTES = ("dense", "gram", "factored", "streamed", "func")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", ["full", "layer_wise"])
def test_every_route_multiplies_with_the_brute_force_matrix(name, blocks):
    model, x = make(name)
    expected = exact_fisher(model, x)
    vectors = torch.randn(len(expected), 3, dtype=torch.float64)
    for route in ROUTES:
        fisher = FisherMatrix(model, x, blocks=blocks, route=route)
        if blocks == "layer_wise":
            expected = block_diagonal(expected, fisher.block_slices)
        assert fisher.route == route
        close(fisher @ vectors, expected @ vectors)
        close(fisher @ vectors[:, 0], expected @ vectors[:, 0])


@pytest.mark.parametrize("name", ["lenet", "attention", "twice"])
@pytest.mark.parametrize("blocks", ["full", "layer_wise"])
@pytest.mark.parametrize("route", ROUTES)
def test_dense_trace_and_eigenpairs_agree_with_brute_force(name, blocks, route):
    model, x = make(name)
    fisher = FisherMatrix(model, x, blocks=blocks, route=route)
    expected = exact_fisher(model, x)
    if blocks == "layer_wise":
        expected = block_diagonal(expected, fisher.block_slices)
    eigenvalues = torch.linalg.eigvalsh(expected)
    close(fisher.to_dense(), expected)
    close(fisher.trace(), expected.trace())
    close(fisher.eigenvalues(), eigenvalues)
    values, vectors = fisher.top_eigenpairs(4)
    close(values, eigenvalues.flip(0)[:4])
    close(expected @ vectors, vectors * values, rtol=1e-9)  # the eigenvector's error is the gap's inverse times rounding
    close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64))


def test_krylov_eigenpairs_agree_with_the_dense_ones(monkeypatch):
    model, x = make("lenet")
    for blocks in ("full", "layer_wise"):
        fisher = FisherMatrix(model, x, blocks=blocks, route="factored")
        dense = fisher.top_eigenpairs(5)[0]
        with monkeypatch.context() as patch:
            patch.setattr("kfac_opt.fisher.matrix.DIRECT_SIZE", 0)
            values, vectors = fisher.top_eigenpairs(5)
        close(values, dense)
        close(fisher @ vectors, vectors * values)


def test_several_batches_count_by_their_size():
    model = mlp()
    x, y = data(9)
    batches = [(x[:5], y[:5]), (x[5:7], y[5:7]), (x[7:], y[7:])]
    for kind in ("exact", "empirical"):
        close(FisherMatrix(model, batches, kind=kind).to_dense(), FisherMatrix(model, (x, y), kind=kind).to_dense())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    close(FisherMatrix(model, loader).to_dense(), exact_fisher(model, x))


@pytest.mark.parametrize("route", ROUTES)
def test_empirical_matrix_is_made_of_the_gradients_of_the_data_labels(route):
    model = mlp()
    x, y = data(9)
    fisher = FisherMatrix(model, (x, y), kind="empirical", route=route)
    expected = label_fisher(model, x, y.unsqueeze(1))
    close(fisher.to_dense(), expected)
    close(fisher @ expected, expected @ expected)


@pytest.mark.parametrize("route", ROUTES)
def test_mc_matrix_is_made_of_the_labels_handed_in(route):
    model = mlp()
    x, _ = data(6)
    labels = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(1))
    fisher = FisherMatrix(model, x, kind="mc", label_samples=4, labels=labels, route=route)
    expected = label_fisher(model, x, labels)
    close(fisher.to_dense(), expected)
    close(fisher @ expected, expected @ expected)
    assert torch.equal(fisher.labels, labels)


def test_mean_of_mc_over_all_labels_is_the_exact_matrix():
    model = mlp()
    x, _ = data(2)
    p = model(x).softmax(-1).detach()
    mean = torch.zeros(())
    for first, second in itertools.product(range(3), repeat=2):
        fisher = FisherMatrix(model, x, kind="mc", labels=torch.tensor([[first], [second]]))
        mean = mean + p[0, first] * p[1, second] * fisher.to_dense()
    close(mean, exact_fisher(model, x))


def test_mc_labels_are_drawn_once_from_the_generator_and_shared_by_the_routes():
    model = mlp()
    x, _ = data(50)
    with torch.no_grad():
        model[2].weight.mul_(4.0)
    draws = [FisherMatrix(model, x, kind="mc", label_samples=2, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8)]
    assert draws[0].labels.shape == (50, 2)
    assert torch.equal(draws[0].labels, draws[1].labels)
    assert not torch.equal(draws[0].labels, draws[2].labels)
    assert not torch.equal(draws[0].labels[:, 0], draws[0].labels[:, 1])
    dense = [FisherMatrix(model, x, kind="mc", route=route).to_dense() for route in ROUTES]
    for matrix in dense[1:]:
        close(matrix, dense[0])
    small_chunks = FisherMatrix(model, x, kind="mc", memory_limit=60_000, route="streamed")
    assert small_chunks._source.capture_chunk < 50
    close(small_chunks.to_dense(), dense[0])


def test_labels_handed_in_follow_the_order_of_the_data_across_batches():
    model = mlp()
    x, _ = data(12)
    labels = FisherMatrix(model, x, kind="mc", label_samples=3).labels
    again = FisherMatrix(model, [x[:4], x[4:]], kind="mc", label_samples=3, labels=labels)
    close(again.to_dense(), FisherMatrix(model, x, kind="mc", label_samples=3).to_dense())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_other_likelihoods_agree_with_brute_force(likelihood):
    model = mlp()
    x, _ = data(5)
    close(FisherMatrix(model, x, likelihood).to_dense(), exact_fisher(model, x, likelihood))
    targets = torch.rand(5, 3, dtype=torch.float64)
    expected = label_fisher(model, x, targets.unsqueeze(-1), likelihood)
    for route in ROUTES:
        fisher = FisherMatrix(model, (x, targets), likelihood, kind="empirical", route=route)
        close(fisher @ expected, expected @ expected)
    drawn = FisherMatrix(model, x, likelihood, kind="mc", label_samples=2)
    assert drawn.labels.shape == (5, 2, 3)
    close(drawn.to_dense(), label_fisher(model, x, drawn.labels.permute(0, 2, 1), likelihood))


def test_gaussian_variance_scales_the_matrix():
    model = mlp()
    x, _ = data(5)
    close(FisherMatrix(model, x, Gaussian(4.0)).to_dense(), exact_fisher(model, x, "gaussian") / 4.0)


def test_one_output_per_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    x, _ = data(5)
    for route in ROUTES:
        fisher = FisherMatrix(model, x, Bernoulli(), route=route)
        expected = exact_fisher(nn.Sequential(*model[:3]), x, "bernoulli")
        close(fisher @ expected, expected @ expected)
    drawn = FisherMatrix(model, x, "bernoulli", kind="mc", label_samples=3)
    assert drawn.labels.shape == (5, 3)


@pytest.mark.parametrize("route", ROUTES)
def test_tokens_are_the_terms_of_a_sequence_model(route):
    torch.manual_seed(2)
    model = TokenModel().double()
    tokens = torch.tensor([[1, 2, 0], [3, 4, 1], [2, 2, 3]])
    fisher = FisherMatrix(model, tokens, route=route)
    expected = exact_fisher(model, tokens)
    assert fisher.num_terms == 9
    close(fisher.to_dense(), expected)
    close(fisher @ expected, expected @ expected)
    labels = torch.randint(3, (3, 3, 2), generator=torch.Generator().manual_seed(0))
    drawn = FisherMatrix(model, tokens, kind="mc", label_samples=2, labels=labels.reshape(9, 2), route=route)
    close(drawn @ expected, label_fisher(model, tokens, labels) @ expected)


@pytest.mark.parametrize("blocks", ["full", "layer_wise"])
def test_columns_are_taken_in_turn_where_one_example_fills_the_memory(blocks):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    tokens = torch.randint(4, (4, 12), generator=torch.Generator().manual_seed(0))
    expected = exact_fisher(model, tokens)
    plenty = FisherMatrix(model, tokens, blocks=blocks)
    tight = FisherMatrix(model, tokens, blocks=blocks, memory_limit=120_000, route="streamed")
    assert plenty._source.capture_columns == 12 * 4
    assert tight._source.capture_columns < 12 * 4
    if blocks == "layer_wise":
        expected = block_diagonal(expected, tight.block_slices)
    close(tight @ expected, expected @ expected)
    close(tight.trace(), expected.trace())
    targets = torch.randint(5, (4, 12), generator=torch.Generator().manual_seed(1))
    whole, parts = (
        gradient_statistics(model, (tokens, targets), memory_limit=limit).layers["3"].norms for limit in (2**30, 100_000)
    )
    close(parts, whole)


@pytest.mark.parametrize("route", ROUTES)
def test_masked_tokens_do_not_count(route):
    torch.manual_seed(2)
    model = Sequence(per_token=True).double()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()
    expected = exact_fisher(model, x, masks=mask)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), mask

    fisher = FisherMatrix(Masked(), ((x, mask), torch.full((4, 3), -100)), outputs=lambda out: out, route=route)
    assert fisher.num_terms == 8
    close(fisher @ expected, expected @ expected)
    drawn = FisherMatrix(Masked(), ((x, mask), None), kind="mc", outputs=lambda out: out, route=route)
    assert drawn.labels.shape == (8, 1)


def test_pixels_are_the_terms_of_a_segmentation_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    fisher = FisherMatrix(model, x, Categorical())
    assert fisher.num_terms == 12
    close(fisher.to_dense(), exact_fisher(model, x, class_dim=0))


def test_layers_whose_rows_cannot_be_told_by_example_are_found():
    found = {}
    for name in (
        "time_first",
        "folded",
        "tied",
        "weight_reused",
        "attention",
        "parameter",
        "lenet",
        "residual",
        "twice",
    ):
        model, x = make(name)
        blocks = FisherMatrix(model, x)._source.blocks
        found[name] = {block.name for block in blocks if block.adapter is None}
    assert found == {
        "time_first": {"inner"},
        "folded": {"inner"},
        "tied": {"first"},
        "weight_reused": {"inner"},
        "attention": {"attention", "attention.out_proj"},
        "parameter": {"", "unused"},
        "lenet": set(),
        "residual": set(),
        "twice": set(),
    }


def test_several_and_named_inputs_reach_the_model():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) * self.right(b)

    model = Two().double()
    a, b = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    expected = exact_fisher(model, (a, b))
    y = torch.zeros(4, dtype=torch.long)
    close(FisherMatrix(model, ((a, b), y)).to_dense(), expected)
    close(FisherMatrix(model, [((a[:1], b[:1]), y[:1]), ((a[1:], b[1:]), y[1:])]).to_dense(), expected)
    close(FisherMatrix(model, {"a": a, "b": b}).to_dense(), expected)


def test_an_object_with_logits_needs_no_outputs_argument():
    from types import SimpleNamespace

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.net(x))

    x, _ = data(4)
    close(FisherMatrix(Wrapped(), x).to_dense(), exact_fisher(mlp(), x))


@pytest.mark.parametrize("route", ROUTES)
def test_batches_of_sequences_of_different_lengths(route):
    torch.manual_seed(2)
    model = TokenModel().double()
    batches = [torch.randint(5, shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 3), (3, 7), (1, 2))]
    expected = sum(exact_fisher(model, tokens) * tokens.numel() for tokens in batches) / 29
    fisher = FisherMatrix(model, batches, route=route)
    assert (fisher.num_terms, fisher.num_rows) == (29, 2 * 29)  # two columns per term of three classes
    close(fisher @ expected, expected @ expected)
    close(fisher.trace(), expected.trace())
    close(fisher.eigenvalues(), torch.linalg.eigvalsh(expected).clamp_min(0))


def test_longer_examples_in_later_batches_are_measured_anew():
    model = TokenModel().double()
    short, long = torch.ones(3, 2, dtype=torch.long), torch.ones(3, 40, dtype=torch.long)
    both, alone = FisherMatrix(model, [(short, None), (long, None)])._source, FisherMatrix(model, long)._source
    assert (both.columns, both.shapes, both.example_bytes) == (alone.columns, alone.shapes, alone.example_bytes)
    with pytest.raises(ValueError, match="one example needs"):
        FisherMatrix(model, [(short, None), (long, None)], memory_limit=4 * both.example_bytes)


def test_parameters_of_two_precisions_are_taken_to_the_higher():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).double())

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(6, 4)
    expected = exact_fisher(copy.deepcopy(model).double(), x.double())
    for route in ROUTES:
        fisher = FisherMatrix(model, x, route=route)
        assert fisher.dtype == torch.float64
        close(fisher @ expected, expected @ expected, rtol=1e-5)  # the body computes in single precision


def test_a_product_with_no_columns_is_empty():
    fisher = FisherMatrix(mlp(), data()[0])
    assert (fisher @ torch.ones(fisher.shape[0], 0)).shape == (fisher.shape[0], 0)


def test_single_precision_agrees_with_double():
    model, x = make("lenet")
    expected = exact_fisher(model, x)
    for route in ROUTES:
        fisher = FisherMatrix(model.float(), x.float(), route=route)
        assert fisher.dtype == torch.float32
        product = fisher @ expected.float()
        assert product.dtype == torch.float32
        close(product.double(), expected @ expected, rtol=1e-5)  # eps 6e-8 times sums of a hundred terms


def test_default_route_is_fast_for_its_size_and_says_why():
    torch.manual_seed(0)
    x = torch.randn(40, 30)
    small = FisherMatrix(nn.Linear(30, 3), x)
    assert small.route == "dense"
    wide = nn.Sequential(nn.Linear(30, 300), nn.ReLU(), nn.Linear(300, 10))
    large = FisherMatrix(wide, x)
    assert large.route == "factored"
    assert "GiB" in large.route_reason or "MiB" in large.route_reason
    assert "func" in large.route_reason
    tight = FisherMatrix(wide, x, memory_limit=300_000)
    assert tight.route in ("streamed", "func")
    vector = torch.randn(large.shape[0])
    close(tight @ vector, large @ vector, rtol=1e-5)
