"""Transposed convolutions against rows read off autograd: what each output place reads of the weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import reference
from tests.support import Lambda, bare_kfac, close, estimate, gradients, pool

DOUBLE = torch.float64
KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SPACE = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "strided": {"stride": 2},
    "strided, padded": {"stride": 2, "padding": 1},
    "output padding": {"stride": 3, "padding": 1, "output_padding": 1},
    "dilated": {"dilation": 2},
    "padding beyond the kernel's reach": {"kernel_size": 2, "padding": 1, "stride": 2},
    "grouped": {"groups": 2},
    "grouped, strided, no bias": {"groups": 2, "stride": 2, "bias": False},
    "depthwise": {"groups": 4, "out": 4},
    "doubling, as in generators": {"kernel_size": 4, "stride": 2, "padding": 1},
}


def network(dims: int, **options) -> nn.Sequential:
    torch.manual_seed(4)
    out, kernel = options.pop("out", 6), options.pop("kernel_size", 3)
    return nn.Sequential(KINDS[dims](4, out, kernel, **options), nn.Tanh(), Lambda(pool), nn.Linear(out, 3)).to(DOUBLE)


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """``[places, groups, in_dim]``: the derivative of each output in the weights of its own output channel, bias last."""
    out = layer(x[None])[0].flatten(1)
    per_group = out.shape[0] // layer.groups
    rows = []
    for place in range(out.shape[1]):
        by_group = []
        for group in range(layer.groups):
            channel = group * per_group
            (weight,) = torch.autograd.grad(out[channel, place], layer.weight, retain_graph=True)
            part = weight.unflatten(0, (layer.groups, -1))[group, :, 0].flatten()
            by_group.append(part if layer.bias is None else torch.cat([part, part.new_ones(1)]))
        rows.append(torch.stack(by_group))
    return torch.stack(rows)


def brute_force(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """``A = (1/N) Σ a aᵀ``, ``G = (1/R) Σ g gᵀ`` over labels, example by example."""
    layer = model[0]
    a_sum, g_sum, rows = 0.0, 0.0, 0
    for example in x:
        a = rows_of(layer, example)
        hidden = layer(example[None]).detach().requires_grad_()
        logits = model[1:](hidden)[0]
        jacobian = torch.stack([torch.autograd.grad(value, hidden, retain_graph=True)[0][0].flatten(1) for value in logits])
        hessian = reference.term_hessian("categorical", logits.detach())
        j = jacobian.unflatten(1, (layer.groups, -1)).permute(3, 1, 0, 2)  # places, groups, classes, channels
        a_sum = a_sum + torch.einsum("pgi,pgj->gij", a, a)
        g_sum = g_sum + (j.mT @ hessian @ j).sum(0)
        rows += len(a)
    return a_sum / len(x), g_sum / rows


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_factors_equal_brute_force(options, dims):
    model = network(dims, **OPTIONS[options])
    x = torch.randn(2, 4, *SPACE[dims], dtype=DOUBLE)
    a, g = brute_force(model, x)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    view = optimizer.curvature["0"]
    close(view.input_factor, a.squeeze(0))
    close(view.output_factor, g.squeeze(0))


@pytest.mark.parametrize("options", ["strided, padded", "grouped", "dilated"])
def test_rows_reproduce_the_gradient_of_the_weight(options):
    """``Σ g aᵀ`` over the rows is the layer's gradient, laid out as the weight is."""
    model = network(2, **OPTIONS[options])
    x = torch.randn(3, 4, 3, 4, dtype=DOUBLE)
    optimizer = bare_kfac(model)
    block = optimizer.curvature["0"].block
    out = model[0](x)
    gradient = torch.randn_like(out)
    weight, bias = torch.autograd.grad(out, list(model[0].parameters()), gradient)
    close(block.adapter.weight_gradient(x, gradient, DOUBLE), block.layout.to_matrix(weight, bias))
    back = block.layout.from_matrix(block.layout.to_matrix(weight, bias))
    assert torch.equal(back[0], weight)
    assert torch.equal(back[1], bias)


@pytest.mark.parametrize("options", ["strided, padded", "grouped"])
def test_direction_solves_the_damped_system(options):
    model = network(2, **OPTIONS[options])
    x, y = torch.randn(8, 4, 3, 4, dtype=DOUBLE), torch.randint(3, (8,))
    optimizer = bare_kfac(model, damping_style="exact", damping=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    before = gradients(model)
    optimizer.precondition_gradients_()
    view, layout = optimizer.curvature["0"], optimizer.curvature["0"].block.layout
    matrix = layout.to_matrix(before["0.weight"], before["0.bias"]).reshape(layout.whole_shape)
    weight, bias = layout.from_matrix(reference.dense_solve(view.to_dense(), 0.1, matrix))
    close(model[0].weight.grad, weight)
    close(model[0].bias.grad, bias)
