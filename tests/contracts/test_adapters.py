"""Every layer adapter shows its module as a linear map; a new one is a class of a few lines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import register_layer
from kfac_opt.layers import LayerAdapter, MatrixLayout, find_adapter
from kfac_opt.layers import adapter as registry
from tests import reference
from tests.support import bare_kfac, close, data, estimate

DOUBLE = torch.float64


def with_statistics(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "linear on sequences": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
    "conv2d same, dilated": (lambda: nn.Conv2d(4, 6, 2, padding="same", dilation=2), (2, 4, 5, 6)),
    "conv2d grouped, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect"), (2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), (2, 2, 3, 3, 3)),
    "batch norm": (lambda: with_statistics(nn.BatchNorm2d(4)), (3, 4, 2, 2)),
    "batch norm in training": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (2, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), (2, 4, 5)),
    "instance norm in evaluation": (
        lambda: with_statistics(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        (2, 4, 3, 3),
    ),
}


def build(name: str) -> tuple[nn.Module, LayerAdapter, Tensor]:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make().to(DOUBLE)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    adapter = find_adapter(module)
    assert adapter is not None
    return module, adapter(module, module.bias is not None), torch.randn(shape, dtype=DOUBLE)


@pytest.mark.parametrize("name", MODULES)
def test_the_module_is_its_matrix_times_its_input_rows(name):
    module, adapter, x = build(name)
    matrix = adapter.layout.to_matrix(module.weight, module.bias)
    rows = adapter.input_rows(x)
    expected = adapter.output_rows(module(x))
    close((rows @ matrix.mT.unsqueeze(1)).detach(), expected.detach())


@pytest.mark.parametrize("name", MODULES)
def test_matrix_layout_goes_there_and_back(name):
    module, adapter, _ = build(name)
    matrix = adapter.layout.to_matrix(module.weight, module.bias)
    assert tuple(matrix.shape) == adapter.layout.shape
    weight, bias = adapter.layout.from_matrix(matrix)
    assert torch.equal(weight, module.weight)
    assert (bias is None) == (module.bias is None)
    if bias is not None:
        assert torch.equal(bias, module.bias)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_sums_over_rows(name, sharing, masked):
    """The fast roads (displacements, chunks, SYRK) against the plain one."""
    _, adapter, x = build(name)
    rows = adapter.input_rows(x)
    _, batch, shared, _ = rows.shape
    keep = torch.rand(batch, shared) < 0.7 if masked else None
    kept = rows if keep is None else rows * keep.unsqueeze(-1)
    if sharing == "reduce":
        count = shared if keep is None else keep.sum(1).clamp_min(1).reshape(1, -1, 1)
        kept = (kept.sum(2) / count).unsqueeze(2)
    flat = kept.flatten(1, 2)
    expected = flat.mT @ flat
    close(adapter.input_moment(x, keep, sharing, DOUBLE), expected)
    close(adapter.input_square(x, keep, sharing, DOUBLE), expected.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("name", MODULES)
def test_weight_gradients_are_output_rows_times_input_rows(name):
    module, adapter, x = build(name)
    out = module(x)
    g = torch.randn_like(out)
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    expected = adapter.layout.to_matrix(*torch.autograd.grad(out, parameters, g))
    rows = adapter.input_rows(x), adapter.output_rows(g)
    close(torch.einsum("gbso,gbsi->goi", rows[1], rows[0]), expected)


class Scale(nn.Module):
    """A layer that the package does not know: a linear map applied to the tanh of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.weight)


def test_a_registered_adapter_gives_a_new_layer_a_kronecker_block(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))

    @register_layer(Scale)
    class ScaleAdapter(LayerAdapter):
        @staticmethod
        def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
            return MatrixLayout("matrix", tuple(module.weight.shape), with_bias)

        def input_rows(self, x: Tensor) -> Tensor:
            return torch.tanh(x).reshape(1, len(x), 1, -1)

        def output_rows(self, gradient: Tensor) -> Tensor:
            return gradient.reshape(1, len(gradient), 1, -1)

    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Linear(4, 4), Scale()).to(DOUBLE), data(1)
    f = reference.fisher_block(model, x, "1")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["1"].to_dense(), f)
    assert find_adapter(Scale()) is ScaleAdapter


def test_the_nearest_base_class_decides():
    class Special(nn.Linear):
        pass

    assert find_adapter(Special(2, 2)) is find_adapter(nn.Linear(2, 2))
    assert find_adapter(nn.Bilinear(2, 2, 2)) is None
    assert find_adapter(nn.LSTM(2, 2)) is None
