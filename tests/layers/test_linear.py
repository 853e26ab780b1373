"""Linear layers: bias or not, frozen parts, and transformers' Conv1D found by its attributes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt.layers import MatrixLayout
from tests import reference
from tests.support import bare_kfac, close, data, estimate, mlp

DOUBLE = torch.float64


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is ``[in, out]``."""

    def __init__(self, out: int, features: int) -> None:
        super().__init__()
        self.nf, self.nx = out, features
        self.weight = nn.Parameter(torch.randn(features, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).reshape(*x.shape[:-1], self.nf)


def no_bias() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).to(DOUBLE)


def test_without_bias_there_is_no_homogeneous_coordinate():
    model, (x, _) = no_bias(), data()
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    assert optimizer.curvature["0"].input_factor.shape == (4, 4)
    close(optimizer.curvature["0"].to_dense(), torch.kron(a, g))


def test_frozen_bias_is_left_out_and_stays():
    model, (x, y) = mlp(), data()
    model[0].bias.requires_grad_(False)
    bias = model[0].bias.clone()
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model, lr=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.curvature["0"].input_factor.shape == (4, 4)
    close(optimizer.curvature["0"].to_dense(), torch.kron(a, g))
    assert torch.equal(model[0].bias, bias)


def test_frozen_weight_leaves_a_diagonal_block_for_the_bias():
    model, (x, y) = mlp(), data(1)
    model[0].weight.requires_grad_(False)
    weight = model[0].weight.clone()
    diagonal = reference.parameter_fisher_diagonal(model, x, model[0].bias)
    optimizer = bare_kfac(model, lr=0.1)
    assert "0" not in optimizer.curvature
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    close(optimizer.curvature["0.bias"].diagonal, diagonal)
    assert torch.equal(model[0].weight, weight)


def test_frozen_layer_is_skipped_and_the_layers_around_it_are_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(DOUBLE)
    model[2].requires_grad_(False)
    x, y = data()
    expected = {n: reference.kronecker_factors(model, x, n) for n in ("0", "4")}
    frozen = [p.clone() for p in model[2].parameters()]
    optimizer = bare_kfac(model, lr=0.1)
    assert list(optimizer.curvature) == ["0", "4"]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, (a, g) in expected.items():
        close(optimizer.curvature[name].to_dense(), torch.kron(a, g))
    assert all(torch.equal(p, q) for p, q in zip(frozen, model[2].parameters()))


def test_a_frozen_first_layer_whose_output_needs_no_gradient():
    model, (x, y) = mlp(), data()
    model[0].requires_grad_(False)
    a, g = reference.kronecker_factors(model, x, "2")
    optimizer = bare_kfac(model, lr=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    close(optimizer.curvature["2"].to_dense(), torch.kron(a, g))


def test_parameters_frozen_after_construction_are_left_alone():
    model, (x, y) = mlp(), data()
    optimizer = bare_kfac(model, lr=0.1)
    model[0].requires_grad_(False)
    before = [p.clone() for p in model[0].parameters()]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model[0].parameters()))


def test_gpt2s_conv1d_is_a_linear_layer_with_a_transposed_weight():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)).to(DOUBLE)
    x, y = data()
    expected = {n: reference.kronecker_factors(model, x, n) for n in ("0", "2")}
    optimizer = bare_kfac(model, damping=0.02, damping_style="exact")
    F.cross_entropy(model(x), y).backward()
    raw = {n: reference.module_matrix(model.get_submodule(n), lambda p: p.grad.clone()) for n in ("0", "2")}
    optimizer.precondition_gradients_()
    for name, (a, g) in expected.items():
        close(optimizer.curvature[name].input_factor, a)
        close(optimizer.curvature[name].output_factor, g)
        module = model.get_submodule(name)
        close(reference.module_matrix(module, lambda p: p.grad), reference.dense_solve(torch.kron(a, g), 0.02, raw[name]))


def test_transformers_own_conv1d_has_a_kronecker_block():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D as Original

    torch.manual_seed(0)
    model = nn.Sequential(Original(5, 4), nn.Tanh(), nn.Linear(5, 3)).to(DOUBLE)
    x, _ = data()
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].to_dense(), torch.kron(a, g))


def test_subclasses_of_a_layer_are_found_along_the_mro():
    class Mine(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(Mine(4, 3)).to(DOUBLE)
    assert list(bare_kfac(model).curvature) == ["0"]


def test_a_renamed_class_is_found_too():
    """FSDP2 swaps the class of a module for one with another name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).to(DOUBLE)
    model[0].__class__ = type("FSDPLinear", (type("FSDPModule", (), {}), nn.Linear), {})
    assert list(bare_kfac(model).curvature) == ["0"]


def test_a_class_that_only_shares_the_name_is_no_linear_layer():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x @ self.weight.T)

    model, (x, _) = nn.Sequential(Linear()).to(DOUBLE), data(1)
    diagonal = reference.parameter_fisher_diagonal(model, x, model[0].weight)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["0.weight"].diagonal, diagonal)


def test_a_linear_layer_used_only_through_its_weight_is_moved_to_the_diagonal_and_named(caplog, recwarn):
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(x @ self.odd.weight.T))

    torch.manual_seed(0)
    model, (x, y) = Functional().to(DOUBLE), data()
    optimizer = bare_kfac(model, lr=0.1)
    before = model.odd.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    said = caplog.text + " ".join(str(w.message) for w in recwarn)
    assert "odd" in said
    assert not torch.equal(before, model.odd.weight)
    assert optimizer.curvature["odd.weight"].diagonal.shape == (4, 4)


def test_a_misspelt_layout_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of .*'matrix'.*, got 'linear'"):
        MatrixLayout("linear", (3, 4))  # type: ignore[arg-type]
