"""A weight used in ways that its module's hook does not see: found at the first estimate, diagonal, named once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_opt import KFAC
from kfac_opt.layers import find_adapter
from tests import reference
from tests.support import assert_same, bare_kfac, close, data, estimate, gradients, train_step, weights

DOUBLE = torch.float64
WARNING = r"the weight of {} enters the outputs in ways.*diagonal curvature"


class EmbeddingHead(nn.Module):
    """The head is the embedding's table, by function instead of by a module."""

    hidden = ("embedding",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.middle(self.embedding(x))), self.embedding.weight)


class TiedAutoencoder(nn.Module):
    hidden = ("encoder",)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T))


class Sliced(nn.Module):
    """Half of the layer is used alone as well."""

    hidden = ("inner",)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(h + F.pad(F.linear(x, self.inner.weight[:2], self.inner.bias[:2]), (0, 2)))


class BiasBeside(nn.Module):
    """Only the bias is used twice."""

    hidden = ("inner",)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) + self.inner.bias)


class Residual(nn.Module):
    """A residual with an inner derivative, as of a differential equation."""

    hidden = ("0", "2")

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.hidden = ("net.0", "net.2")

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([du[:, :1] + u.square(), du[:, 1:2], u], dim=1)


class NormBeside(nn.Module):
    hidden = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x)) * self.norm.weight)


HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "embedding as head": EmbeddingHead,
    "transposed decoder": TiedAutoencoder,
    "slice": Sliced,
    "bias beside": BiasBeside,
    "inner derivative": Residual,
    "norm beside": NormBeside,
}


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    x, y = data(batch=5)
    return (torch.arange(5) % 3 if isinstance(model, EmbeddingHead) else x), y


def steps(optimizer: KFAC, model: nn.Module, number: int) -> None:
    for step in range(number):
        train_step(optimizer, model, *data(seed=step))


def build(name: str) -> nn.Module:
    torch.manual_seed(2)
    return HIDDEN[name]().double()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_use_gets_diagonal_curvature_and_is_named_once(name, fisher):
    model = build(name)
    optimizer = KFAC(model, fisher=fisher, factor_interval=1)
    pattern = WARNING.format(", ".join(f"'{own}'" for own in model.hidden))
    with pytest.warns(UserWarning, match=pattern) as said:
        train_step(optimizer, model, *batch(model))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train_step(optimizer, model, *batch(model))
    for own in model.hidden:
        assert own not in optimizer.curvature
        assert float(optimizer.curvature[f"{own}.weight"].diagonal.sum()) > 0
    others = [own for own, module in model.named_modules() if isinstance(module, nn.Linear) and own not in model.hidden]
    assert all(float(optimizer.curvature[own].to_dense().diagonal().sum()) > 0 for own in others)


@pytest.mark.parametrize("name", HIDDEN)
def test_its_diagonal_is_the_brute_force_one(name):
    """The mean of the unbiased estimates of one example, over which the exact diagonal is taken."""
    model = build(name)
    x = batch(model)[0][:1]
    expected = {
        f"{own}.weight": reference.parameter_fisher_diagonal(model, x, model.get_submodule(own).weight) for own in model.hidden
    }
    optimizer = bare_kfac(model)
    with pytest.warns(UserWarning, match="enters the outputs"):
        train_step(optimizer, model, x, torch.tensor([1]))
    estimate(optimizer, model, x)
    for own, diagonal in expected.items():
        close(optimizer.curvature[own].diagonal, diagonal)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_net_of_functions_gets_diagonal_blocks_by_name(fisher):
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(F.linear(x, self.inner.weight, self.inner.bias))
            return F.linear(hidden, self.head.weight, self.head.bias)

    model = Functional().double()
    optimizer = KFAC(model, fisher=fisher)
    with pytest.warns(UserWarning, match="forward of 'inner', 'head' never ran"):
        train_step(optimizer, model, *data())
    train_step(optimizer, model, *data())
    assert list(optimizer.curvature) == ["inner.weight", "inner.bias", "head.weight", "head.bias"]
    assert all(float(view.diagonal.sum()) > 0 for view in optimizer.curvature.values())


class ActivatedNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class ZeroResidual(nn.Module):
    """Nothing comes back through the branch until its last layer has left zero."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.last, self.head = branch, nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.last(self.branch(x))))


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("kind", ["own forward", "hidden use", "never ran"])
def test_a_late_verdict_counts_as_well(kind, fisher):
    class Beside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight.sum()

    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight, self.inner.bias)

    torch.manual_seed(1)
    branch, name = {
        "own forward": (ActivatedNorm(4), "branch"),
        "hidden use": (Beside(4, 4), "branch"),
        "never ran": (Function(), "branch.inner"),
    }[kind]
    model = ZeroResidual(branch).double()
    optimizer = KFAC(model, fisher=fisher, factor_interval=1)
    before = weights(model)
    with pytest.warns(UserWarning, match=f"'{name}'.*diagonal curvature") as said:
        steps(optimizer, model, 8)
    assert len(said) == 1
    assert float(optimizer.curvature[f"{name}.weight"].diagonal.sum()) > 0
    after = weights(model)
    assert all(float((after[own] - before[own]).norm()) > 1e-4 for own in before)


def test_a_run_that_goes_on_is_as_good_at_late_verdicts():
    torch.manual_seed(1)
    model = ZeroResidual(ActivatedNorm(4)).double()
    optimizer = KFAC(model, factor_interval=1, lr=0.0)
    train_step(optimizer, model, *data())
    optimizer.detach()
    resumed = KFAC(model)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match="'branch' has a forward of its own"):
        steps(resumed, model, 5)
    assert "branch.weight" in resumed.curvature


# -- right loops --------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A call that reaches no output, a call that is detached, calls with different inputs, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.frozen, self.head, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shared(x))
        self.spare(h), self.shared(h)
        with torch.no_grad():
            target = self.shared(x)
        return self.head(torch.tanh(self.shared(self.frozen(h))) + self.shared(x).detach() + target)


class Rematerialised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Cancelling(nn.Module):
    """An instance norm takes out what the bias in front of it adds: its gradient is nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 3, 3, padding=1), nn.InstanceNorm1d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x.unsqueeze(1))).mean(-1))


RIGHT = {"heads": Heads, "checkpoint": Rematerialised, "cancelling": Cancelling}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RIGHT)
def test_right_models_keep_their_blocks_without_a_word(name, dtype, fisher):
    torch.manual_seed(0)
    model = RIGHT[name]().to(dtype)
    optimizer = KFAC(model, fisher=fisher, factor_interval=1, lr=1e-3)
    layers = list(optimizer.curvature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            x, y = data(dtype=dtype, seed=step)
            optimizer.zero_grad()
            penalty = sum(p.float().square().sum() for n, p in model.named_parameters() if "spare" not in n)
            loss = F.cross_entropy(model(x).float(), y) + 1e-2 * penalty
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert list(optimizer.curvature) == layers


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("name", [*HIDDEN, *RIGHT])
def test_the_users_gradients_are_bit_for_bit_the_same(name, fisher):
    found = []
    for attach in (False, True):
        torch.manual_seed(2)
        model = {**HIDDEN, **RIGHT}[name]()
        optimizer = KFAC(model, fisher=fisher) if attach else None
        x, y = batch(model)
        for _ in range(2):
            F.cross_entropy(model(x if isinstance(model, EmbeddingHead) else x.float()), y).backward()
        found.append(gradients(model))
        del optimizer
    assert_same(*found)


def test_a_table_whose_gradient_torch_divides_by_frequencies_is_not_accused():
    model = nn.Sequential(nn.Embedding(3, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = KFAC(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(optimizer, model, torch.tensor([[0, 0], [1, 2], [0, 1]]), torch.arange(3))
    assert list(optimizer.curvature) == ["0", "2"]


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_derivative_of_the_outputs_in_the_loss_concerns_the_empirical_fisher_alone(fisher):
    """The loss's own gradient then reaches the weights beside the outputs of their layers; sampled labels know nothing of it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = KFAC(model, fisher=fisher, likelihood="gaussian", factor_interval=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(3):
            x = data(seed=seed, dtype=torch.float32)[0].requires_grad_()
            optimizer.zero_grad()
            outputs = model(x)
            (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
            (slope.sum(1) - outputs[:, 0]).square().mean().backward()
            optimizer.step()
    assert ["derivative of its outputs in the loss" in str(w.message) for w in said] == [True] * (fisher == "empirical")
    assert list(optimizer.curvature) == (["0.weight", "0.bias", "2.weight", "2.bias"] if fisher == "empirical" else ["0", "2"])


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_bias_alone_proves_nothing(fisher):
    """The weight's use beside its module shows as soon as an input is not zero."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(x)) + F.linear(x, self.inner.weight).square())

    model = Beside()
    optimizer = KFAC(model, fisher=fisher, factor_interval=1)
    x, y = data(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(optimizer, model, torch.zeros_like(x), y)
    assert optimizer._workings.capture.proven == {"head"}
    with pytest.warns(UserWarning, match=WARNING.format("'inner'")):
        train_step(optimizer, model, x, y)


def test_a_proof_holds_until_the_layer_is_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = KFAC(model)
    train_step(optimizer, model, *data(dtype=torch.float32))
    assert optimizer._workings.capture.proven == {"0", "2"}
    model[2] = nn.Linear(4, 3)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert optimizer._workings.capture.proven <= {"0"}


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided, padded, dilated, grouped": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sums_of_a_convolution_are_those_of_its_rows(name):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[name]().double()
    adapter = find_adapter(layer)(layer, layer.bias is not None)
    x = torch.randn(3, 4, 7, 7, dtype=DOUBLE)
    out = layer(x)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, list(layer.parameters()), gradient)
    close(adapter.weight_gradient(x, gradient, DOUBLE), adapter.layout.to_matrix(*found))
    inputs, outputs = adapter.input_rows(x), adapter.output_rows(gradient)
    close(adapter.gradient_spread(x, gradient, DOUBLE), (inputs.square().sum(-1) * outputs.square().sum(-1)).sum())
