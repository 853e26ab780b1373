"""Schedules write the damping they promise, per group, and go on where they were saved."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from kfac_opt import KFAC
from kfac_opt.damping import ExponentialDamping, LevenbergMarquardt, LinearDamping, TrustRegionDamping
from tests.damping.helpers import classifier, take_step


def two_groups() -> KFAC:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = [{"params": model[0].parameters(), "damping": 1.0}, {"params": model[1].parameters(), "damping": 0.01}]
    return KFAC(model, groups, update_scale="natural")


def test_exponential_damping_multiplies_every_group_by_the_decay_and_stops_at_the_bound():
    optimizer = two_groups()
    rule = ExponentialDamping(optimizer, decay=0.1, min_damping=5e-4)
    seen = []
    for _ in range(3):
        rule.step()
        seen.append(rule.get_last_damping())
    assert seen[0] == pytest.approx([0.1, 0.001])
    assert seen[1] == pytest.approx([0.01, 5e-4])
    assert seen[2] == pytest.approx([0.001, 5e-4])


def test_exponential_growth_ends_at_the_upper_bound_however_many_steps():
    rule = ExponentialDamping(two_groups(), decay=1e3, max_damping=7.0)
    for _ in range(1000):
        rule.step()
    assert rule.get_last_damping() == [7.0, 7.0]


def test_linear_damping_reaches_the_final_factor_after_the_total_steps_and_stays():
    rule = LinearDamping(two_groups(), final_factor=0.2, total_steps=4)
    first = []
    for _ in range(6):
        rule.step()
        first.append(rule.get_last_damping()[0])
    assert first == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    assert rule.get_last_damping()[1] == pytest.approx(0.002)


def test_a_schedule_resumes_from_its_state_in_either_order_of_loading():
    optimizer = two_groups()
    rule = ExponentialDamping(optimizer, decay=0.5)
    for _ in range(3):
        rule.step()
    saved = copy.deepcopy(rule.state_dict())
    rule.step()
    expected = rule.get_last_damping()
    again = ExponentialDamping(two_groups(), decay=0.5)
    again.load_state_dict(saved)
    assert again.get_last_damping() == pytest.approx([0.125, 0.00125])
    again.step()
    assert again.get_last_damping() == pytest.approx(expected)


def test_the_optimizer_preconditions_with_the_damping_that_the_schedule_wrote():
    model, optimizer, x, y = classifier(damping_style="exact")
    take_step(model, optimizer, x, y)
    gradient = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    ExponentialDamping(optimizer, decay=0.01).step()
    written = optimizer.curvature["0"].precondition(gradient)
    form = optimizer.curvature["0"].spectral_form()
    torch.testing.assert_close(written, form.solve(gradient.unsqueeze(0), 0.001).squeeze(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda o: ExponentialDamping(o, decay=0.0), "decay must be > 0"),
        (lambda o: ExponentialDamping(o, decay=math.inf), "decay must be > 0"),
        (lambda o: ExponentialDamping(o, decay=0.5, min_damping=0.0), "0 < min_damping < max_damping"),
        (lambda o: LinearDamping(o, final_factor=-1.0, total_steps=3), "final_factor must be > 0"),
        (lambda o: LinearDamping(o, final_factor=0.5, total_steps=0), "interval must be an integer >= 1"),
        (lambda o: TrustRegionDamping(o, gain=0.0), "gain must be > 0"),
        (lambda o: TrustRegionDamping(o, interval=0), "interval must be an integer >= 1"),
        (lambda o: TrustRegionDamping(o, min_scale=0.0), r"min_scale must be in \(0, 1\]"),
        (lambda o: TrustRegionDamping(o, deadband=1.0), r"deadband must be in \[0, 1\)"),
        (lambda o: LevenbergMarquardt(o, decay=1.0), r"decay must be in \(0, 1\)"),
        (lambda o: LevenbergMarquardt(o, interval=True), "interval must be an integer >= 1"),
        (lambda o: LevenbergMarquardt(o, reach=0.5), "reach must be >= 1"),
        (lambda o: LevenbergMarquardt(o, min_scale=2.0), r"min_scale must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(build, message: str):
    with pytest.raises(ValueError, match=message):
        build(two_groups())


def test_an_optimizer_without_damping_is_refused_by_name():
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match="parameter group 0 of SGD has no 'damping'"):
        ExponentialDamping(sgd, decay=0.5)
    with pytest.raises(TypeError, match="expected an optimizer, got int"):
        TrustRegionDamping(3)  # type: ignore[arg-type]


def test_the_state_of_another_rule_or_of_other_groups_is_refused():
    rule = ExponentialDamping(two_groups(), decay=0.5)
    with pytest.raises(ValueError, match="the state has the keys"):
        rule.load_state_dict(TrustRegionDamping(two_groups()).state_dict())
    with pytest.raises(ValueError, match="the state is that of 1 parameter groups, the optimizer has 2"):
        rule.load_state_dict({"num_steps": 1, "initial_dampings": [0.1]})
