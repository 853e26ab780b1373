"""Sums of inputs that are larger than the inputs are formed in the step, one layer after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kfac_opt import KFAC
from kfac_opt._curvature import factors, sides

BATCH = 3


@pytest.fixture(autouse=True)
def panels_from_sixteen(monkeypatch):
    monkeypatch.setattr(sides, "PANEL_DIM", 16)


def make(factor_dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(45, 30), nn.Linear(30, 3))
    return model, KFAC(model, factor_interval=1, factor_dtype=factor_dtype, **options)


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 4, 3, 3, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def run(model, optimizer, passes, disturb=lambda x: None):
    for number in range(passes):
        x, y = data(number)
        nn.functional.cross_entropy(model(x), y).backward()
        disturb(x)
    waiting = sum(len(statistics.late) for statistics in optimizer._workings.capture.pending.statistics.values())
    optimizer.step()
    return waiting, [optimizer.curvature[name].input_factor for name in ("0", "2", "3")]


@pytest.mark.parametrize("options", [{}, {"max_block_dim": 18}, {"curvature": "eigenbasis"}], ids=str)
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_factors_are_those_of_sums_formed_at_once(passes, options, monkeypatch):
    waiting, late = run(*make(**options), passes)
    assert waiting > 0
    monkeypatch.setattr(factors, "LATE_RATIO", math.inf)
    waiting, expected = run(*make(**options), passes)
    assert waiting == 0
    for found, wanted in zip(late, expected):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_kept_never_outgrows_the_sum():
    model, optimizer = make()
    for number in range(40):
        x, y = data(number)
        nn.functional.cross_entropy(model(x), y).backward()
        for name, statistics in optimizer._workings.capture.pending.statistics.items():
            kept = sum(part.call.x.nbytes for part in statistics.late)
            assert kept <= 8 * math.prod(optimizer.blocks[name].block.sides["input"].sum_shape)


def test_an_input_that_is_overwritten_before_the_step_changes_nothing():
    _, expected = run(*make(), 2)
    _, found = run(*make(), 2, disturb=lambda x: x.fill_(torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_an_input_whose_moment_overflows_leaves_all_factors_untouched():
    """Its logits are finite: only the second moment, which is not formed yet, would not be."""
    model, optimizer = make(torch.float32)
    _, before = run(model, optimizer, 1)
    optimizer.zero_grad()
    scale = torch.ones(45)
    scale[7] = 1e30
    with torch.no_grad():
        model[2].weight[:, 7] = 0.0
    captured = model[2].register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    x, y = data(9)
    nn.functional.cross_entropy(model(x), y).backward()
    captured.remove()
    assert optimizer.dropped_estimates == 1
    optimizer.zero_grad()
    optimizer.step()
    after = [optimizer.curvature[name].input_factor for name in ("0", "2", "3")]
    assert all(torch.equal(a, b) for a, b in zip(after, before))


def test_memory_of_an_estimate_holds_one_large_sum_at_a_time():
    model, optimizer = make()
    x, y = data(0)
    nn.functional.cross_entropy(model(x), y).backward()
    pending = optimizer._workings.capture.pending.statistics
    assert [name for name, statistics in pending.items() if "input" in statistics.sums] == []
    blocks = [(optimizer.blocks[name].block, statistics) for name, statistics in pending.items()]
    seen = []
    for block, _ in blocks:
        form = block.update

        def update(state, own, terms, decay, form=form):
            form(state, own, terms, decay)
            seen.append(sum("input" in statistics.sums for _, statistics in blocks))

        block.update = update
    optimizer.step()
    assert seen == [0] * len(blocks)
