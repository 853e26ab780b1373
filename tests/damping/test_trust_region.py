"""The cheap rule: its signals are what they are said to be, and the damping moves the right way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from kfac_opt import KFAC
from kfac_opt.damping import TrustRegionDamping
from kfac_opt.damping.trust_region import _cosine
from tests.damping.helpers import classifier, take_step


class Plain(torch.optim.SGD):
    """SGD that lets a rule write a damping and a trust-region scale: the signals can be set by hand."""

    def __init__(self, parameter: nn.Parameter, damping: float = 1.0) -> None:
        super().__init__([{"params": [parameter], "damping": damping}], lr=1.0)
        self.trust_region_scales: dict[int, torch.Tensor] = {}


def drive(gradients: list[list[float]], scale: float | None = None, **options) -> TrustRegionDamping:
    """Feeds gradients; each step is minus the gradient."""
    weight = nn.Parameter(torch.zeros(len(gradients[0])))
    optimizer = Plain(weight)
    rule = TrustRegionDamping(optimizer, **{"interval": 2, "gain": 1.0, "deadband": 0.0, "early_steps": 0, **options})
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        optimizer.trust_region_scales = {} if scale is None else {0: torch.tensor(scale)}
        rule.step()
    return rule


def test_damping_falls_by_the_gain_times_the_cosine_while_the_loss_still_falls_along_the_step():
    # step (-3, -4), next gradient (3, 0): cosine -0.6
    rule = drive([[3.0, 4.0], [3.0, 0.0]])
    assert rule.get_last_damping() == pytest.approx([math.exp(-0.6)], rel=1e-6)


def test_damping_rises_when_the_next_gradient_says_that_the_step_went_too_far():
    rule = drive([[3.0, 4.0], [-3.0, 0.0]], deadband=0.1)
    assert rule.get_last_damping() == pytest.approx([math.exp(0.5)], rel=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_cosines_within_the_deadband_change_nothing(sign: float):
    rule = drive([[3.0, 4.0], [sign * 3.0, sign * -1.5]], deadband=0.25)
    assert rule.get_last_damping() == [1.0]


def test_a_trust_region_that_cuts_too_much_raises_damping_whatever_the_cosine():
    rule = drive([[3.0, 4.0], [3.0, 0.0]], scale=0.01, min_scale=0.04)
    assert rule.get_last_damping() == pytest.approx([2.0], rel=1e-5)  # exp(log(0.04 / 0.01) / 2)


def test_damping_falls_no_further_than_the_room_that_the_trust_region_leaves():
    rule = drive([[1.0, 0.0], [1.0, 0.0]], scale=0.05, min_scale=0.04)
    assert rule.get_last_damping() == pytest.approx([0.8], rel=1e-5)


def test_one_change_is_bounded():
    rule = drive([[1.0, 0.0], [1.0, 0.0]], gain=100.0, max_change=2.0)
    assert rule.get_last_damping() == pytest.approx([math.exp(-2.0)], rel=1e-6)


def test_the_first_changes_come_after_two_four_and_eight_steps():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = Plain(weight)
    rule = TrustRegionDamping(optimizer, interval=10)
    changed = []
    for step in range(1, 32):
        before = rule.get_last_damping()
        weight.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
        rule.step()
        if rule.get_last_damping() != before:
            changed.append(step)
    assert changed == [2, 4, 8, 10, 20, 30]


def test_the_cosine_is_that_of_all_parameters_joined():
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]
    steps = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    expected = torch.nn.functional.cosine_similarity(gradient, torch.cat([s.flatten() for s in steps]), dim=0)
    torch.testing.assert_close(_cosine(parameters, steps), expected)


def test_zero_and_missing_gradients_leave_the_damping_alone():
    assert drive([[1.0, 0.0], [0.0, 0.0]]).get_last_damping() == [1.0]
    weight = nn.Parameter(torch.zeros(2))
    rule = TrustRegionDamping(Plain(weight), interval=1)
    for _ in range(3):
        rule.step()
    assert rule.get_last_damping() == [1.0]


def test_a_gradient_that_is_not_finite_leaves_the_damping_alone():
    assert drive([[1.0, 0.0], [math.nan, 0.0]]).get_last_damping() == [1.0]


def test_groups_have_dampings_of_their_own():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    timid = {"params": model[0].parameters(), "damping": 10.0}
    cut = {"params": model[2].parameters(), "damping": 1e-6, "kl_clip": 1e-10}
    optimizer = KFAC(model, [timid, cut], update_scale="natural", lr=0.1, damping_scale="absolute")
    rule = TrustRegionDamping(optimizer)
    _, _, x, y = classifier()
    for _ in range(10):
        take_step(model, optimizer, x, y)
        rule.step()
    first, second = rule.get_last_damping()
    assert first < 10.0, "timid steps, and yet the damping did not fall"
    assert second > 1e-6, "the trust region cuts nearly everything, and yet the damping did not rise"


def test_early_steps_go_to_the_trust_region_whatever_the_cosine():
    rule = drive([[3.0, 4.0]], scale=0.5, min_scale=0.1, early_steps=3)
    assert rule.get_last_damping() == pytest.approx([0.04], rel=1e-5)  # exp(-2 log(0.5 / 0.1))
    assert drive([[3.0, 4.0]], scale=0.05, min_scale=0.1, early_steps=3).get_last_damping() == [1.0]
    assert drive([[3.0, 4.0], [3.0, 0.0]], early_steps=3).get_last_damping() < [1.0], "without a clip the cosine decides"


@pytest.mark.parametrize("start", [1e-3, 1e1])
def test_any_start_is_forgotten_within_the_early_steps(start: float):
    model, optimizer, x, y = classifier(damping=start, lr=0.1, kl_clip=1e-3)
    rule = TrustRegionDamping(optimizer)
    for _ in range(10):
        take_step(model, optimizer, x, y)
        rule.step()
    other, reference, x, y = classifier(damping=1.0, lr=0.1, kl_clip=1e-3)
    expected = TrustRegionDamping(reference)
    for _ in range(10):
        take_step(other, reference, x, y)
        expected.step()
    assert 1 / 4 < rule.get_last_damping()[0] / expected.get_last_damping()[0] < 4


def test_early_changes_wait_until_the_inverses_hold_the_last_one():
    model, optimizer, x, y = classifier(damping=10.0, ramp_steps=0, inverse_interval=5, lr=0.1)
    rule = TrustRegionDamping(optimizer)
    seen = []
    for _ in range(7):
        take_step(model, optimizer, x, y)
        rule.step()
        seen += rule.get_last_damping()
    assert seen[0] < 10.0, "the first step is much shorter than the trust region"
    assert len(set(seen[:5])) == 1, "changed although the inverses still hold the first damping"
    assert seen[5] < seen[4]


def test_the_scale_that_the_rule_reads_is_the_one_of_the_kl_clip():
    model, optimizer, x, y = classifier(kl_clip=1e-6, momentum=0.0, max_relative_update=None)
    assert optimizer.trust_region_scales == {}
    before = [p.detach().clone() for p in model.parameters()]
    take_step(model, optimizer, x, y)
    scale = float(optimizer.trust_region_scales[0])
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before)])
    free, loose, x, y = classifier(kl_clip=None, momentum=0.0, max_relative_update=None)
    take_step(free, loose, x, y)
    unclipped = torch.cat([(p.detach() - q).flatten() for p, q in zip(free.parameters(), before)])
    assert 0.0 < scale < 1.0
    assert loose.trust_region_scales == {}
    torch.testing.assert_close(moved, scale * unclipped, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [8, 9, 10])
def test_resuming_is_exact_wherever_it_was_saved(steps: int):
    def train(model, optimizer, rule, x, y, number):
        for _ in range(number):
            take_step(model, optimizer, x, y)
            rule.step()
        return rule.get_last_damping()

    model, optimizer, x, y = classifier()
    rule = TrustRegionDamping(optimizer)
    train(model, optimizer, rule, x, y, steps)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), rule.state_dict()))
    expected = train(model, optimizer, rule, x, y, 12)
    again, other, x, y = classifier()
    resumed = TrustRegionDamping(other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert train(again, other, resumed, x, y, 12) == expected
    assert expected != [0.1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_the_cosine_of_steps_of_any_size(size):
    """Products of squares leave single precision from 1e-10 on: the cosine was 0."""
    torch.manual_seed(0)
    parameters = [torch.randn(5, 3).requires_grad_(), torch.randn(4).requires_grad_()]
    for parameter in parameters:
        parameter.grad = size * torch.randn_like(parameter)
    step = [size * torch.randn_like(parameter) for parameter in parameters]
    both = [torch.cat([part.double().flatten() / size for part in parts]) for parts in ([p.grad for p in parameters], step)]
    expected = torch.nn.functional.cosine_similarity(*both, dim=0)
    found = _cosine(parameters, step)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
