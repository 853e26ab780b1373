"""When factors and inverses are renewed: intervals in optimizer steps, the early ramp, what counts as a step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kfac_opt import KFAC
from kfac_opt._step import schedule
from kfac_opt._step.schedule import refresh_due
from tests.support import bare_kfac, data, mlp

DOUBLE = torch.float64


def watch(steps: int, **options) -> tuple[list[int], list[int]]:
    """Steps at which the factors changed, and at which the preconditioner changed, at constant weights."""
    model = mlp()
    optimizer = bare_kfac(model, factor_decay=0.5, **options)
    fixed_x, fixed_y = data(8, seed=999)
    with optimizer.paused():
        gradient = torch.autograd.grad(F.cross_entropy(model(fixed_x), fixed_y), list(model.parameters()))
    factors, inverses, last = [], [], (None, None)
    for step in range(steps):
        model((1 + step) * data(8, seed=step)[0])
        for p, g in zip(model.parameters(), gradient):
            p.grad = g.clone()
        optimizer.precondition_gradients_()
        now = (optimizer.curvature["0"].input_factor.clone(), model[0].weight.grad.clone())
        if last[0] is None or not torch.equal(last[0], now[0]):
            factors.append(step)
        if last[1] is None or not torch.equal(last[1], now[1]):
            inverses.append(step)
        last = now
    return factors, inverses


@pytest.mark.parametrize("style", ["factored", "exact"])
@pytest.mark.parametrize(("factor_interval", "inverse_interval"), [(1, 1), (1, 4), (2, 4), (3, 6), (5, 5)])
def test_without_a_ramp_the_intervals_are_kept_from_the_first_step(factor_interval, inverse_interval, style):
    factors, inverses = watch(
        14, factor_interval=factor_interval, inverse_interval=inverse_interval, ramp_steps=0, damping_style=style
    )
    assert factors == list(range(0, 14, factor_interval))
    assert inverses == list(range(0, 14, inverse_interval))


def test_ramp_renews_factors_every_step_and_inverses_after_1_1_2_4_steps():
    factors, inverses = watch(40, factor_interval=5, inverse_interval=20, ramp_steps=10)
    assert factors[:10] == list(range(10))
    assert all(later - earlier == 5 for earlier, later in pairwise(factors[10:]))
    assert 10 <= factors[10] <= 14
    assert inverses[:5] == [0, 1, 2, 4, 8]
    assert all(later - earlier <= 20 for earlier, later in pairwise(inverses))


def test_ramp_ends_at_the_interval():
    """After 1, 1, 2, 4, 8 steps the inverses are renewed at the interval, never more rarely."""
    _, inverses = watch(60, factor_interval=1, inverse_interval=8, ramp_steps=10)
    assert inverses[:5] == [0, 1, 2, 4, 8]
    assert [b - a for a, b in pairwise(inverses[4:])] == [8] * (len(inverses) - 5)


def test_defaults_ramp_up():
    model = mlp()
    optimizer = KFAC(model, lr=0.0)
    group = optimizer.param_groups[0]
    assert group["factor_interval"] > 1
    assert group["inverse_interval"] >= group["factor_interval"]
    seen = []
    for step in range(4):
        model((1 + step) * data(8, seed=step)[0])
        optimizer.step()
        seen.append(optimizer.curvature["0"].input_factor.clone())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("passes", [1, 3])
def test_intervals_count_optimizer_steps_and_not_passes(passes):
    model = mlp()
    optimizer = bare_kfac(model, factor_interval=2, inverse_interval=2, factor_decay=0.0)
    changed, last = [], None
    for step in range(5):
        for p in range(passes):
            model(data(4, seed=10 * step + p)[0])
        optimizer.step()
        now = optimizer.curvature["0"].input_factor.clone()
        if last is None or not torch.equal(now, last):
            changed.append(step)
        last = now
    assert changed == [0, 2, 4]


def test_interval_can_change_while_training():
    model = mlp()
    optimizer = bare_kfac(model, factor_interval=1, inverse_interval=1, factor_decay=0.0)
    changed, last = [], None
    for step in range(12):
        if step == 4:
            for group in optimizer.param_groups:
                group["factor_interval"] = 4
        model(data(4, seed=step)[0])
        optimizer.step()
        now = optimizer.curvature["0"].input_factor.clone()
        if last is None or not torch.equal(now, last):
            changed.append(step)
        last = now
    assert changed == [0, 1, 2, 3, 4, 8]


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_attached_on_steps_that_do_not_capture():
    model = mlp()
    optimizer = bare_kfac(model, factor_interval=3, inverse_interval=3)
    counts = []
    for step in range(6):
        counts.append(hooks(model))
        model(data(4, seed=step)[0])
        optimizer.step()
    assert [c > 0 for c in counts] == [True, False, False, True, False, False]


def test_a_step_without_gradients_and_statistics_does_not_fail_and_counts():
    model = mlp()
    optimizer = bare_kfac(model, factor_interval=2, inverse_interval=2, lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 3 for p in model.parameters())


def test_a_due_estimate_waits_for_the_next_forward_in_training_mode():
    model = mlp()
    optimizer = bare_kfac(model, lr=0.1)
    model.eval()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.step()
    model.train()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.step()
    assert optimizer.curvature["0"].input_factor.isfinite().all()


def refreshed(steps: int, depth: int, interval: int, refresh: str) -> list[list[int]]:
    """For every layer of equal size the steps at which its preconditioner changed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(depth)]).to(DOUBLE)
    optimizer = bare_kfac(model, likelihood="gaussian", inverse_interval=interval, factor_decay=0.5, refresh=refresh)
    probe, seen = torch.randn(4, 5, dtype=DOUBLE), [[] for _ in range(depth)]
    last: list[torch.Tensor | None] = [None] * depth
    for step in range(steps):
        model((1 + step) * data(8, seed=step)[0])
        optimizer.step()
        for index, view in enumerate(optimizer.curvature.values()):
            now = view.precondition(probe)
            if last[index] is None or not torch.equal(last[index], now):
                seen[index].append(step)
            last[index] = now
    return seen


def test_staggered_refreshes_spread_the_layers_over_the_interval():
    """No step does the work of all: each layer once per interval, every step its share."""
    seen = refreshed(steps=72, depth=6, interval=18, refresh="staggered")
    for steps in seen:
        assert steps[0] == 0  # nothing to precondition with before
        assert all(later - earlier == 18 for earlier, later in pairwise(steps[2:]))
    for step in range(18, 72):
        assert sum(step in steps for steps in seen) == (step % 3 == 0)


def test_short_rounds_refresh_all_layers_at_their_start():
    for steps in refreshed(steps=14, depth=4, interval=6, refresh="staggered"):
        assert steps == [0, 6, 12]


def test_together_refreshes_all_layers_at_the_start_of_the_interval():
    for steps in refreshed(steps=14, depth=4, interval=6, refresh="together"):
        assert steps == [0, 6, 12]


def refreshes(phases: list[float], interval: int, steps: int, **options: bool) -> list[list[int]]:
    return [[step for step in range(steps) if refresh_due(step, interval, 10, phase, **options)] for phase in phases]


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5, 8, 10, 20, 100])
def test_even_rounds_spread_the_ramp_and_keep_every_layer_fresh(interval: int):
    """Of ten layers that cost the same no step but the first refreshes more than a third, and no layer waits longer than
    the distance of its turns in the round before allows."""
    phases = [number / 10 for number in range(10)]
    turns = refreshes(phases, interval, 400, even=True)
    counts = [sum(step in layer for layer in turns) for step in range(400)]
    assert max(counts[1 if interval > 2 else 2 :]) <= max(4, -(-10 // interval))
    for layer in turns:
        assert all(later - earlier <= max(2 * interval, 1) for earlier, later in pairwise([0, *layer]) if later)
        late = [step for step in layer if step >= 200]
        assert all(later - earlier == interval for earlier, later in pairwise(late))


def test_small_nets_keep_the_ramp_as_it_is():
    phases = [number / 10 for number in range(10)]
    for layer in refreshes(phases, 100, 16):
        assert layer == [0, 1, 2, 4, 8]


def test_a_net_whose_refresh_is_dear_is_spread_from_the_second_step_on(monkeypatch):
    """Counted in factorizations: the first step makes all inverses, the next ones a share each."""
    monkeypatch.setattr(schedule, "EVEN_FROM", 1.0)
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (torch.nn.Linear(6, 6), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6, 3)).double()
    optimizer = KFAC(model, lr=0.01)
    made, before = [], 0
    for step in range(16):
        optimizer.zero_grad()
        x, y = data(12, seed=step)
        F.cross_entropy(model(torch.cat([x, x[:, :2]], 1)), y).backward()
        optimizer.step()
        total = sum(int(state["curvature"]["refreshes"]) for state in optimizer.state.values() if "curvature" in state)
        made.append(total - before)
        before = total
    assert made[0] == 7
    for start, end, most in ((1, 4, 3), (4, 8, 2), (8, 16, 1)):
        assert sum(made[start:end]) == 7
        assert max(made[start:end]) <= most
    together = KFAC(model, refresh="together")
    assert not together._workings.schedule._even
