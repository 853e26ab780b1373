"""What FisherMatrix refuses, what it leaves alone, and how it walks through data."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_opt import KFAC
from kfac_opt.fisher import FisherMatrix
from tests.fisher.brute import exact_fisher
from tests.support import Lambda, assert_same, close, data, mlp


class Changing:
    """An iterable whose passes differ: ``passes[i]`` in pass ``i``, the last one for ever."""

    def __init__(self, *passes: list) -> None:
        self.passes, self.count = passes, 0

    def __iter__(self):
        current = self.passes[min(self.count, len(self.passes) - 1)]
        self.count += 1
        return iter(current)


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()


def test_batch_normalization_in_training_mode_is_refused():
    x, _ = data()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) normalizes with the statistics of its batch.*model.eval\(\)"):
        FisherMatrix(with_norm(), x)
    model = with_norm().eval()
    model[1] = nn.BatchNorm1d(5, track_running_stats=False).double()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\).*give the layer running statistics"):
        FisherMatrix(model.eval(), x)


def test_hidden_batch_statistics_are_found():
    x, _ = data()
    model = nn.Sequential(nn.Linear(4, 3), Lambda(lambda z: z - z.mean(0))).double()
    with pytest.raises(ValueError, match=r"first two examples change by .* examples see each other"):
        FisherMatrix(model, x)


def test_randomness_in_the_forward_is_refused_and_undone():
    x, _ = data()
    with pytest.raises(ValueError, match=r"'1' \(Dropout\) drops units at random in training mode.*model.eval\(\)"):
        FisherMatrix(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double(), x)
    hidden = nn.Sequential(nn.Linear(4, 3), Lambda(lambda z: F.dropout(z, 0.5, training=True))).double()
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers in its forward"):
        FisherMatrix(hidden, x)
    assert torch.equal(before, torch.random.get_rng_state())
    FisherMatrix(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).double(), x)


@pytest.mark.parametrize("route", ["streamed", "func"])
def test_loaders_that_change_between_passes_are_refused(route):
    model = mlp()
    x, y = data(8)
    first = [(x[:4], y[:4]), (x[4:], y[4:])]
    vector = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    cases = [
        ([(x[:4], y[:4])], "changed its size between passes: 2 batches \\(8 examples\\) first, now 1 \\(4 examples\\)"),
        ([*first, (x[:1], y[:1])], "batch 2 has 1 examples, it had no such batch before"),
        ([(x[:4], y[:4]), (x[4:7], y[4:7])], "batch 1 has 3 examples, it had 4 examples before"),
        ([(x[:4], y[:4]), (x[:4], y[:4])], "batch 1 holds other examples than in the first pass"),
        ([(x[:4].flip(0), y[:4]), (x[4:], y[4:])], "batch 0 holds other examples.*shuffle=False"),
    ]
    for later, message in cases:
        fisher = FisherMatrix(model, Changing(first, later), route=route)
        with pytest.raises(ValueError, match=message):
            fisher @ vector
    fisher = FisherMatrix(model, (pair for pair in first), route=route)
    with pytest.raises(ValueError, match=r"no examples in this pass.*an iterator can be walked through only once"):
        fisher @ vector


def test_a_shuffling_loader_repeats_its_order_and_takes_nothing_from_the_global_generator():
    model = mlp()
    x, y = data(20)
    expected = exact_fisher(model, x)
    for own in (None, torch.Generator().manual_seed(5)):
        loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True, generator=own)
        before = torch.random.get_rng_state()
        own_before = None if own is None else own.get_state()
        fisher = FisherMatrix(model, loader, kind="mc", label_samples=2, route="func")
        torch.rand(3)  # the caller goes on drawing
        streamed = FisherMatrix(model, loader, route="streamed")
        product = fisher @ expected
        assert torch.equal(torch.random.get_rng_state(), advanced(before, 3))
        torch.random.set_rng_state(before)
        assert own is None or torch.equal(own.get_state(), own_before)
        close(fisher.to_dense() @ expected, product)
        close(streamed @ expected, expected @ expected)


def advanced(state: Tensor, draws: int) -> Tensor:
    kept = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    torch.rand(draws)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(kept)
    return after


def test_data_that_is_no_data_is_named():
    model = mlp()
    x, y = data()
    cases = [
        (5, TypeError, "data is int, expected a tensor of inputs, an"),
        ([], ValueError, "the data holds no examples. Give at least one"),
        (x[:0], ValueError, "the data holds no examples"),
        ([(x, y, y)], TypeError, "batch 0 of the data has 3 parts"),
        ([("a", "b")], TypeError, "batch 0 of the data is str without a tensor"),
        ([x[:4], x[4:]], ValueError, r"list of two tensors of shape \[4, 4\]: a pair, or two batches\? Give the tuple"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            FisherMatrix(model, given)


def test_a_likelihood_that_does_not_fit_the_output_is_named():
    x, y = data()
    one = nn.Sequential(nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"holds a single class.*likelihood='bernoulli'"):
        FisherMatrix(one, x)
    with pytest.raises(ValueError, match=r"targets are \[8\], expected a tensor of shape \[8, 3\].*gaussian likelihood"):
        FisherMatrix(mlp(), (x, y), "gaussian", kind="empirical")
    with pytest.raises(ValueError, match=r"targets are \[8, 3\], expected a tensor of shape \[8\]"):
        FisherMatrix(mlp(), (x, torch.zeros(8, 3)), kind="empirical")
    with pytest.raises(TypeError, match=r"targets have dtype torch.float64, the categorical likelihood expects class numbers"):
        FisherMatrix(mlp(), (x, y.double()), kind="empirical")
    with pytest.raises(ValueError, match=r"targets lie in \[0, 7\], expected class numbers in \[0, 2\]"):
        FisherMatrix(mlp(), (x, torch.arange(8)), kind="empirical")
    with pytest.raises(ValueError, match=r"targets are NoneType.*Give \(inputs, targets\) pairs"):
        FisherMatrix(mlp(), x, kind="empirical")
    with pytest.raises(ValueError, match=r"targets lie in \[0, 7\], the bernoulli likelihood expects values in \[0, 1\]"):
        FisherMatrix(one, (x, torch.arange(8.0).unsqueeze(1)), "bernoulli", kind="empirical")
    with pytest.raises(ValueError, match="the targets hold values that are not finite"):
        FisherMatrix(one, (x, torch.full((8, 1), float("inf"))), "gaussian", kind="empirical")
    with pytest.raises(ValueError, match="likelihood must be one of"):
        FisherMatrix(mlp(), x, "softmax")
    with pytest.raises(ValueError, match=r"outputs of shape \[1, 8, 3\] for 8 examples|outputs of shape \[1, 3, 3\] for 3"):
        FisherMatrix(nn.Sequential(mlp(), Lambda(lambda z: z.unsqueeze(0))), x)
    with pytest.raises(TypeError, match="the model returned tuple, expected a tensor of logits"):
        FisherMatrix(nn.Sequential(mlp(), Lambda(lambda z: (z, z))), x)
    with pytest.raises(ValueError, match=r"values that are not finite. Check the weights and the data"):
        FisherMatrix(mlp(), x * float("nan"))


def test_limits_that_cannot_be_met_are_refused_with_the_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 100), nn.ReLU(), nn.Linear(100, 10))
    x = torch.randn(200, 30)
    with pytest.raises(ValueError, match=r"one example needs .* of working memory.*Raise memory_limit to at least"):
        FisherMatrix(model, x, memory_limit=2000)
    with pytest.raises(ValueError, match=r"route 'gram' keeps \d\d.\d MiB, but memory_limit=4.0 MiB leaves 3.0 MiB.*streamed"):
        FisherMatrix(model, x, memory_limit=2**22, route="gram")
    with pytest.raises(ValueError, match=r"route 'dense' keeps 1\d\d.\d MiB"):
        FisherMatrix(model, x, memory_limit=2**22, route="dense")
    tight = FisherMatrix(model, x, memory_limit=2**22)
    for call, what in ((tight.to_dense, "to_dense"), (tight.eigenvalues, "eigenvalues")):
        with pytest.raises(ValueError, match=rf"{what} of .*4110.* memory_limit is 4.0 MiB.*spectral_density"):
            call()
    with pytest.raises(ValueError, match=r"40 eigenpairs of size 4110 need .*ask for fewer pairs"):
        FisherMatrix(model, x, memory_limit=2**20).top_eigenpairs(40)
    values, vectors = tight.top_eigenpairs(2)
    close(tight @ vectors, vectors * values, rtol=1e-3)  # single precision, tolerance 1e-5 of the largest


def test_the_limit_from_the_message_is_enough():
    model, x = nn.Linear(30, 10), torch.randn(50, 30)
    for size in (300, 1_500):
        with pytest.raises(ValueError, match="at least") as error:
            FisherMatrix(model, x, memory_limit=size)
        amount, unit = str(error.value).rsplit("at least ", 1)[1].rstrip(".").split()
        enough = int(float(amount) * {"KiB": 2**10, "MiB": 2**20}[unit]) + 2**10
        close(FisherMatrix(model, x, memory_limit=enough).trace(), FisherMatrix(model, x).trace(), rtol=1e-5)


def test_bad_arguments_are_named():
    model = mlp()
    x, _ = data()
    cases = [
        (dict(kind="type2"), r"kind must be one of \['exact', 'mc', 'empirical'\], got 'type2'"),
        (dict(blocks="layerwise"), "blocks must be one of"),
        (dict(route="fast"), "route must be one of"),
        (dict(kind="mc", label_samples=0), "label_samples must be a whole number >= 1, got 0"),
        (dict(memory_limit=0), "memory_limit must be a number of bytes > 0, got 0"),
        (dict(labels=torch.zeros(8, 1)), "labels belong to kind='mc', got kind='exact'"),
        (dict(kind="mc", labels=torch.zeros(7, 1)), r"labels have shape \[7, 1\], expected \[8, 1\]"),
        (dict(kind="mc", label_samples=2, labels=torch.zeros(8, 1)), r"expected \[8, 2\]"),
        (dict(kind="mc", labels=torch.full((8, 1), 3)), r"labels are torch.int64 in \[3, 3\], expected class numbers"),
        (dict(kind="mc", labels=torch.zeros(8, 1)), r"labels are torch.float32 .*\(torch.long\) in \[0, 2\]"),
        (dict(kind="mc", label_samples=1.5), "label_samples must be a whole number >= 1, got 1.5"),
        (dict(memory_limit="2 GiB"), "memory_limit must be a number of bytes > 0, got '2 GiB'"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            FisherMatrix(model, x, **arguments)
    with pytest.raises(TypeError, match=r"generator is int, expected a torch.Generator or None"):
        FisherMatrix(model, x, kind="mc", generator=3)
    with pytest.raises(TypeError, match=r"model is function, expected a torch.nn.Module"):
        FisherMatrix(lambda z: z, x)
    fisher = FisherMatrix(model, x, memory_limit=2e9)
    for bad, message in ((torch.ones(3), r"cannot multiply with \[3\]"), (2.0, "cannot multiply with float")):
        with pytest.raises(ValueError, match=message):
            fisher @ bad
    for k in (0, fisher.shape[0] + 1):
        with pytest.raises(ValueError, match=rf"k must be a whole number in \[1, {fisher.shape[0]}\], got {k}"):
            fisher.top_eigenpairs(k)
    with pytest.raises(ValueError, match="no trainable parameters"):
        FisherMatrix(mlp().requires_grad_(False), x)
    with pytest.raises(ValueError, match="do not depend on its trainable parameters"):
        FisherMatrix(nn.Sequential(mlp(), Lambda(lambda z: z.detach())), x)
    with pytest.raises(ValueError, match="every term of the data is masked"):
        FisherMatrix(model, x, outputs=lambda z: (z, torch.zeros(len(z), dtype=torch.bool)))


@pytest.mark.parametrize("route", ["dense", "gram", "factored", "streamed", "func"])
def test_model_gradients_modes_buffers_and_random_states_are_left_alone(route):
    model = with_norm().eval()
    model[0].train()
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    kept = {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [p.grad.clone() for p in model.parameters()],
        "modes": [part.training for part in model.modules()],
        "random": torch.random.get_rng_state(),
    }
    fisher = FisherMatrix(model, (x, y), kind="mc", route=route)
    fisher @ torch.ones(fisher.shape[0], dtype=torch.float64)
    fisher.trace(), fisher.eigenvalues(), fisher.top_eigenpairs(1)
    after = {
        "state": model.state_dict(),
        "gradients": [p.grad for p in model.parameters()],
        "modes": [part.training for part in model.modules()],
        "random": torch.random.get_rng_state(),
    }
    assert_same(after, kept)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("route", ["dense", "factored", "streamed", "func"])
def test_the_matrix_stays_that_of_the_weights_it_was_made_with(route):
    model = mlp()
    x, _ = data()
    fisher = FisherMatrix(model, x, route=route)
    expected = exact_fisher(model, x)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    close(fisher @ expected, expected @ expected)
    model.train()
    model.eval()


def test_a_changed_mode_is_refused_where_the_model_is_run_again():
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).eval()
    x, _ = data()
    vector = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    fisher = FisherMatrix(model, x, route="func")
    model.train()
    with pytest.raises(RuntimeError, match="changed between training and evaluation mode"):
        fisher @ vector


def test_an_attached_optimizer_does_not_count_the_passes():
    model = mlp()
    x, y = data()
    optimizer = KFAC(model, lr=0.1)
    model.train()
    for route in ("factored", "streamed", "func"):
        fisher = FisherMatrix(model, x, route=route)
        fisher @ torch.ones(fisher.shape[0], dtype=torch.float64)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    factor = optimizer.curvature["0"].input_factor
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    close(factor.double(), ones.T @ ones / len(x), rtol=1e-5)  # single precision factors of one pass
    optimizer.detach()


def test_a_compiled_model_is_taken_out_of_its_wrapper():
    model = mlp()
    x, _ = data()
    compiled = torch.compile(model, backend="eager")
    close(FisherMatrix(compiled, x).to_dense(), exact_fisher(model, x))


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["dense", "gram", "factored", "streamed", "func"])
def test_matrices_on_a_gpu_agree_with_the_cpu(route):
    model = mlp()
    x, _ = data()
    labels = FisherMatrix(model, x, kind="mc").labels
    here = FisherMatrix(model, x, kind="mc").to_dense()
    there = FisherMatrix(model.cuda(), x, kind="mc", route=route)
    assert there.device.type == "cuda"
    assert torch.equal(there.labels.cpu(), labels)
    close((there @ here.cuda()).cpu(), here @ here)
