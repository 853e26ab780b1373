"""Convolutions of every kind against explicit patch loops: factors, exact block of one position, step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies
from torch import nn

from tests import reference
from tests.support import Lambda, bare_kfac, close, estimate, gradients, pool

DOUBLE = torch.float64

CONVOLUTIONS_2D = {
    "plain": {},
    "1x1": {"kernel_size": 1},
    "rectangular kernel": {"kernel_size": (3, 2)},
    "strided": {"stride": 2},
    "rectangular stride": {"stride": (1, 2)},
    "padded": {"padding": 1},
    "wide padding": {"padding": 3},
    "rectangular padding": {"padding": (2, 0)},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "same, dilated even kernel": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "valid": {"padding": "valid"},
    "dilated": {"dilation": 2},
    "dilated, padded": {"dilation": 2, "padding": 2},
    "dilated, strided, padded": {"dilation": (2, 1), "padding": (1, 2), "stride": (2, 3)},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular same": {"padding": "same", "padding_mode": "circular"},
    "circular strided": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "grouped": {"groups": 2},
    "grouped, strided, padded": {"groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"groups": 4, "out": 4, "padding": 1},
    "depthwise, two per channel": {"groups": 4, "out": 8},
    "no bias": {"bias": False},
    "grouped, no bias": {"groups": 2, "bias": False},
    "kernel as large as the image": {"kernel_size": 5},
    "strided and padded, uneven": {"stride": 2, "padding": 1, "kernel_size": 4},
    "stride beyond the kernel": {"kernel_size": 1, "stride": 2},
    "large kernel, padded": {"kernel_size": 5, "padding": 2},
}


def network(kind: type[nn.Module], channels: int = 4, **options) -> nn.Sequential:
    """Convolution ``"0"``, tanh, mean over positions, linear ``"3"``."""
    torch.manual_seed(4)
    out, kernel = options.pop("out", 6), options.pop("kernel_size", 3)
    return nn.Sequential(kind(channels, out, kernel, **options), nn.Tanh(), Lambda(pool), nn.Linear(out, 3)).to(DOUBLE)


def assert_convolution(model: nn.Sequential, x: torch.Tensor, sharing: str) -> None:
    a, g = reference.kronecker_factors(model, x, "0", sharing=sharing)
    optimizer = bare_kfac(model, weight_sharing=sharing)
    estimate(optimizer, model, x)
    view = optimizer.curvature["0"]
    close(view.input_factor, a)
    close(view.output_factor, g)
    close(view.to_dense(), reference.dense_kronecker(a, g))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("options", CONVOLUTIONS_2D)
def test_two_dimensional(options, sharing):
    assert_convolution(network(nn.Conv2d, **CONVOLUTIONS_2D[options]), torch.randn(2, 4, 5, 6, dtype=DOUBLE), sharing)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": 2, "padding_mode": "reflect"},
        {"groups": 2, "bias": False},
        {"kernel_size": 4, "padding": "same"},
    ],
    ids=str,
)
def test_one_dimensional(options, sharing):
    assert_convolution(network(nn.Conv1d, **options), torch.randn(3, 4, 7, dtype=DOUBLE), sharing)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (1, 2, 1), "padding": (1, 0, 1), "kernel_size": 2},
        {"kernel_size": (1, 2, 3), "dilation": (1, 2, 1)},
        {"groups": 2, "kernel_size": 2, "padding": "same"},
        {"kernel_size": 2, "padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_three_dimensional(options, sharing):
    model = network(nn.Conv3d, channels=2, out=4, **options)
    assert_convolution(model, torch.randn(2, 2, 3, 4, 3, dtype=DOUBLE), sharing)


@pytest.mark.parametrize("options", ["same", "dilated", "strided", "circular", "grouped", "no bias", "depthwise"])
def test_reference_patches_reach_the_weights_that_the_convolution_uses(options):
    """The references check each other: patches read by loops against autograd's Jacobian of the weight."""
    settings = CONVOLUTIONS_2D[options]
    torch.manual_seed(4)
    out, rest = settings.get("out", 6), {k: v for k, v in settings.items() if k != "out"}
    first = nn.Conv2d(4, out, 3, **rest)
    model = nn.Sequential(first, Lambda(lambda h: torch.tanh(h[:, :, 0, 0])), nn.Linear(out, 3)).to(DOUBLE)
    x = torch.randn(1, 4, 5, 5, dtype=DOUBLE)
    f = reference.fisher_block(model, x, "0")
    examples = reference.layer_rows(model, x, "0")
    a, j = examples[0]["inputs"][0], examples[0]["jacobian"][:, 0]
    blocks = [
        reference.dense_kronecker(a[k].outer(a[k])[None], (j[:, k].T @ examples[0]["hessian"] @ j[:, k])[None])
        for k in range(len(a))
    ]
    in_dim, groups = a.shape[-1], a.shape[0]
    index = torch.arange(out * in_dim).reshape(in_dim, groups, -1)
    for k, block in enumerate(blocks):
        where = index[:, k].reshape(-1)
        close(f[where[:, None], where[None, :]], block)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"bias": False}, {"dilation": 2, "padding": 1}], ids=str)
def test_block_is_the_exact_fisher_for_one_example_with_one_position(options):
    model = network(nn.Conv2d, **options)
    x = torch.randn(1, 4, 3, 3, dtype=DOUBLE)
    expected = reference.fisher_block(model, x, "0")
    if options.get("groups", 1) > 1:  # the Fisher has blocks between groups, the approximation has none
        group = torch.arange(6).repeat(expected.shape[0] // 6) // 3
        expected = torch.where(group[:, None] == group[None, :], expected, 0.0)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].to_dense(), expected)


@pytest.mark.parametrize("options", CONVOLUTIONS_2D)
def test_step_equals_a_dense_solve(options):
    model = network(nn.Conv2d, **CONVOLUTIONS_2D[options])
    x, y = torch.randn(2, 4, 5, 6, dtype=DOUBLE), torch.tensor([0, 2])
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model, damping=0.02, damping_style="exact")
    F.cross_entropy(model(x), y).backward()
    v = reference.module_matrix(model[0], lambda p: p.grad.clone())
    optimizer.precondition_gradients_()
    # the dense solve's own error: eps * condition (largest eigenvalue of A ⊗ G over the damping, below 1e4)
    close(
        reference.module_matrix(model[0], lambda p: p.grad),
        reference.dense_solve(reference.dense_kronecker(a, g), 0.02, v),
        rtol=1e-9,
    )


@pytest.mark.parametrize("options", ["plain", "padded", "strided", "dilated", "grouped", "same"])
def test_duplicating_every_example_changes_nothing(options):
    model, twin = (network(nn.Conv2d, **CONVOLUTIONS_2D[options]) for _ in range(2))
    x, y = torch.randn(2, 4, 5, 6, dtype=DOUBLE), torch.tensor([0, 2])
    results = []
    for net, copies in ((model, 1), (twin, 3)):
        optimizer = bare_kfac(net, damping=0.02)
        F.cross_entropy(net(x.repeat(copies, 1, 1, 1)), y.repeat(copies)).backward()
        optimizer.precondition_gradients_()
        results.append((optimizer.curvature["0"].to_dense(), gradients(net)))
    close(results[1][0], results[0][0])
    for name in results[0][1]:
        close(results[1][1][name], results[0][1][name], rtol=1e-9)


@pytest.mark.parametrize("size", [(3, 3), (4, 7), (9, 9)])
@pytest.mark.parametrize("options", ["padded", "plain", "strided", "large kernel, padded", "wide padding"])
def test_every_map_size_has_the_right_scale(size, options):
    settings = dict(CONVOLUTIONS_2D[options])
    if settings.get("kernel_size", 3) == 5 and min(size) < 5:
        settings["padding"] = 4
    assert_convolution(network(nn.Conv2d, channels=2, out=2, **settings), torch.randn(2, 2, *size, dtype=DOUBLE), "expand")


def test_channels_last_inputs_give_the_same_factors():
    x = torch.randn(2, 4, 5, 6, dtype=DOUBLE)
    dense = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = network(nn.Conv2d, padding=1).to(memory_format=memory_format)
        optimizer = bare_kfac(model)
        estimate(optimizer, model, x.to(memory_format=memory_format))
        dense.append(optimizer.curvature["0"].to_dense())
    close(dense[1], dense[0])


def test_an_unbatched_image_is_one_example_of_a_convolution():
    """``[channels, height, width]``: torch's convolutions take it, so it must not be read as a batch of channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), Lambda(lambda h: h.flatten(1).mean(1)[None]), nn.Linear(3, 3)).to(DOUBLE)
    x = torch.randn(2, 4, 4, dtype=DOUBLE)
    batched = nn.Sequential(model[0], model[1], Lambda(pool), model[3])
    a, g = reference.kronecker_factors(batched, x[None], "0")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].input_factor, a)
    close(optimizer.curvature["0"].output_factor, g)


@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [(40, 3, {"padding": 1}), (210, 3, {"padding": 1}), (20, 5, {"padding": 2}), (40, 3, {"stride": 2})],
)
def test_many_channels_give_the_factor_of_the_unfolded_image(channels, kernel, options):
    """Implementations may change the algorithm with the number of channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 2, kernel, **options), Lambda(pool)).to(DOUBLE)
    x = torch.randn(2, channels, 6, 5, dtype=DOUBLE)
    rows = torch.cat([reference.input_rows(model[0], image)[:, 0] for image in x])
    optimizer = bare_kfac(model, max_factor_dim=2000)
    model(x)
    optimizer.step()
    close(optimizer.curvature["0"].input_factor, rows.T @ rows / 2)


def test_convolution_behind_an_in_place_relu():
    """The output tensor is rewritten by the next module; the gradient must be the one before it."""

    def make(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=inplace), Lambda(pool), nn.Linear(3, 3)).to(DOUBLE)

    x = torch.randn(4, 2, 4, 4, dtype=DOUBLE)
    dense = []
    for inplace in (False, True):
        model = make(inplace)
        optimizer = bare_kfac(model)
        estimate(optimizer, model, x)
        dense.append(optimizer.curvature["0"].to_dense())
    assert torch.equal(*dense)
    a, g = reference.kronecker_factors(make(False), x, "0")
    close(dense[1], torch.kron(a, g))


@settings(max_examples=40, deadline=None)
@given(data=strategies.data())
def test_any_convolution_has_the_factors_of_the_plain_loop(data):
    """Random dimensions, kernels, strides, paddings, modes, dilations, groups and map sizes."""

    def draw(strategy):
        return data.draw(strategy)

    dims = draw(strategies.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(strategies.integers(low, high)) for _ in range(dims))

    groups = draw(strategies.sampled_from([1, 1, 2]))
    kernel, dilation = each(1, 3), each(1, 2)
    mode = draw(strategies.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    same = draw(strategies.booleans())
    stride = (1,) * dims if same else each(1, 3)
    padding = "same" if same else each(0, 2)
    size = tuple(s + d * (k - 1) for s, d, k in zip(each(3, 5), dilation, kernel))  # reflection needs room
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    model = network(kind, channels=2, out=2, kernel_size=kernel, bias=draw(strategies.booleans()), **options)
    x = torch.randn(2, 2, *size, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    assert_convolution(model, x, draw(strategies.sampled_from(["expand", "reduce"])))
