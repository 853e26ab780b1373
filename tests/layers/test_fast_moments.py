"""Second moments without patches equal the plain im2col version: every kind of layer, both ways of displacements."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_opt.layers import conv, displacement, find_adapter
from kfac_opt.layers.adapter import second_moment
from tests.support import close

DOUBLE = torch.float64


def plain(adapter, x: torch.Tensor) -> torch.Tensor:
    """The moment of the rows that the adapter itself lays out one by one."""
    rows = adapter.input_rows(x).flatten(1, 2)
    return rows.mT @ rows


def assert_moment(module: nn.Module, x: torch.Tensor, rtol: float = 1e-10) -> None:
    adapter = find_adapter(module)(module, module.bias is not None)
    close(adapter.input_moment(x, None, "expand", x.dtype), plain(adapter, x), rtol=rtol)
    gradient = torch.randn_like(module(x))
    rows = adapter.output_rows(gradient).flatten(1, 2)
    close(adapter.output_moment(gradient, None, "expand", x.dtype), rows.mT @ rows, rtol=rtol)


DISPLACED = {
    "3x3": {"padding": 1},
    "3x3, dilated": {"padding": 2, "dilation": 2},
    "3x1": {"kernel_size": (3, 1), "padding": (1, 0)},
    "1x3, dilated": {"kernel_size": (1, 3), "padding": (0, 3), "dilation": (1, 3)},
    "1x1": {"kernel_size": 1},
    "same": {"padding": "same", "dilation": (1, 2)},
    "grouped": {"padding": 1, "groups": 2},
    "no bias": {"padding": 1, "bias": False},
}


@pytest.mark.parametrize("size", [(5, 6), (1, 4), (2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("product_channels", [1, 10**9], ids=["products", "weight gradient"])
@pytest.mark.parametrize("options", DISPLACED)
def test_displacements_equal_patches(options, product_channels, size, monkeypatch):
    monkeypatch.setattr(displacement, "PRODUCT_CHANNELS", product_channels)
    monkeypatch.setattr(conv, "FEW_CHANNELS", 1)
    torch.manual_seed(0)
    settings = {"kernel_size": 3, **DISPLACED[options]}
    module = nn.Conv2d(4, 6, **settings).to(DOUBLE)
    assert find_adapter(module)(module, True).by_displacements()
    assert_moment(module, torch.randn(3, 4, *size, dtype=DOUBLE))


@pytest.mark.parametrize("product_channels", [1, 10**9], ids=["products", "weight gradient"])
def test_displacements_in_one_dimension(product_channels, monkeypatch):
    monkeypatch.setattr(displacement, "PRODUCT_CHANNELS", product_channels)
    monkeypatch.setattr(conv, "FEW_CHANNELS", 1)
    torch.manual_seed(0)
    assert_moment(nn.Conv1d(4, 6, 3, padding=2, dilation=2).to(DOUBLE), torch.randn(3, 4, 7, dtype=DOUBLE))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 0},
        {"stride": 2, "padding": 1},
        {"padding": 2},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 5, "padding": 2},
    ],
    ids=str,
)
def test_other_convolutions_do_not_take_displacements(options):
    module = nn.Conv2d(4, 6, **{"kernel_size": 3, **options})
    assert not find_adapter(module)(module, True).by_displacements()


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "padding_mode": "circular", "padding": 1}], ids=str
)
def test_chunks_of_patches_add_up(options, monkeypatch):
    monkeypatch.setattr(conv, "CHUNK_ENTRIES", 800)  # two examples of 4 · 5 · 5 · 9 entries do not fit
    torch.manual_seed(0)
    assert_moment(nn.Conv2d(4, 6, 3, **options).to(DOUBLE), torch.randn(5, 4, 5, 5, dtype=DOUBLE))


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(24, 40, 3, padding=1), nn.Conv2d(240, 8, 3, padding=1), nn.Conv2d(24, 40, 3, stride=2, bias=False)],
)
def test_single_precision_up_to_rounding(module):
    torch.manual_seed(0)
    x = torch.randn(4, module.in_channels, 6, 6)
    # eps · sqrt(rows = 144), with a margin of 10 for the order of summation
    assert_moment(module, x, rtol=1.2e-7 * 12 * 10)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_of_every_rank(shape, bias):
    torch.manual_seed(0)
    assert_moment(nn.Linear(5, 3, bias=bias).to(DOUBLE), torch.randn(shape, dtype=DOUBLE))


def test_a_kept_row_still_goes_through_the_plain_version():
    torch.manual_seed(0)
    module = nn.Conv2d(20, 6, 3, padding=1).to(DOUBLE)
    adapter, x = find_adapter(module)(module, True), torch.randn(2, 20, 4, 4, dtype=DOUBLE)
    keep = torch.rand(2, 16) > 0.5
    expected = second_moment(adapter.input_rows(x), keep)
    close(adapter.input_moment(x, keep, "expand", DOUBLE), expected)
    assert not torch.allclose(expected, plain(adapter, x))
