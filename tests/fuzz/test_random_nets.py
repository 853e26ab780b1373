"""Random networks against per-example autograd: factors, scales, diagonals and directions, number by number."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_opt import KFAC
from tests.fuzz.brute import Truth, mean_loss, truth
from tests.fuzz.compare import Comparison, Setting
from tests.fuzz.fixed import fixed_likelihood
from tests.fuzz.nets import Case, Draw, cases
from tests.quiet import beyond_announcements, own_warnings
from tests.support import bare_kfac

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")  # they are listened to
UNKNOWN_EXAMPLES = "not known which rows belong to one example"  # where batches are not in front
PRECONDITIONERS = [
    ("kronecker", "factored"),
    ("kronecker", "exact"),
    ("kronecker", "split"),
    ("eigenbasis", "exact"),
    ("diagonal", "factored"),
]
FUZZ = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}


@st.composite
def optimizer_settings(draw: Draw) -> Setting:
    """What can be compared number by number."""
    fisher = draw(st.sampled_from(["mc", "exact", "empirical"]))
    curvature, style = draw(st.sampled_from(PRECONDITIONERS))
    return Setting(
        fisher,
        curvature,
        style,
        sharing=draw(st.sampled_from(["expand", "expand", "reduce"])),
        label_samples=draw(st.sampled_from([1, 2])) if fisher == "mc" else 1,
        damping=draw(st.sampled_from([1e-2, 1.0])),
        scale=draw(st.sampled_from(["absolute", "relative"])),
        power=draw(st.sampled_from([1.0, 1.0, 0.5])),
        through=draw(st.sampled_from(["tensor", "tensor", "outputs"])),
    )


@settings(max_examples=70, **FUZZ)
@given(cases(), optimizer_settings())
def test_curvature_and_directions_of_random_nets(case, setting):
    check(case, setting)


@settings(max_examples=20, **FUZZ)
@given(cases(masked=True), optimizer_settings())
def test_curvature_and_directions_of_random_nets_with_masked_terms(case, setting):
    check(case, setting)


@pytest.mark.slow
@settings(max_examples=1000, **FUZZ)
@given(cases(), optimizer_settings())
def test_curvature_and_directions_of_many_random_nets(case, setting):
    check(case, setting)


@pytest.mark.slow
@settings(max_examples=200, **FUZZ)
@given(cases(masked=True), optimizer_settings())
def test_curvature_and_directions_of_many_random_nets_with_masked_terms(case, setting):
    check(case, setting)


def check(case: Case, setting: Setting) -> None:
    """A step of a bare KFAC with ``lr=1`` on the passes of ``case``, against the reference.

    A step with ``lr=0`` comes before it: what a layer's weight does beside its forward shows in it, and all else repeats.
    """
    note(f"{case.model}\ninputs {[tuple(x.shape) for x in case.inputs]}, {case.likelihood}, masks {case.masks}, {setting}")
    expected = truth(case, setting.fisher, setting.sharing)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    mask: list[Tensor] = []
    pick = {"tensor": None, "outputs": lambda logits: (logits, mask[-1]) if mask else logits}[setting.through]
    with own_warnings() as said:
        optimizer = bare_kfac(
            case.model,
            fisher=setting.fisher,
            curvature=setting.curvature,
            damping_style=setting.style,
            weight_sharing=setting.sharing,
            label_samples=setting.label_samples,
            damping=setting.damping,
            damping_scale=setting.scale,
            power=setting.power,
            factor_decay=0.0,  # the last estimate alone: bases of degenerate factors may differ between the steps
            likelihood=fixed_likelihood(case.likelihood, case.variance),
            outputs=pick,
        )
        for lr in (0.0, 1.0):
            optimizer.param_groups[0]["lr"] = lr
            run(optimizer, case, expected, mask if setting.through == "outputs" else None)
            check_gradients(case, expected)
    moved = {name: before[name] - p.detach() for name, p in case.model.named_parameters()}
    unexpected = beyond_announcements(said, [UNKNOWN_EXAMPLES] if case.unaligned else [])
    assert not unexpected, unexpected
    Comparison(optimizer, case, setting, expected, moved).run()


def run(optimizer: KFAC, case: Case, expected: Truth, handed_over: list[Tensor] | None) -> None:
    """One step; masks go into ``handed_over`` if it is there, else through ``masked``."""
    optimizer.zero_grad()
    for number, x in enumerate(case.inputs):
        mask = None if case.masks is None else case.masks[number]
        if handed_over is not None and mask is not None:
            handed_over.append(mask)
        with nullcontext() if mask is None or handed_over is not None else optimizer.masked(mask):
            logits = case.model(x)
        mean_loss(case, number, logits, expected.terms).backward()
    optimizer.step()
    assert optimizer.dropped_estimates == 0


def check_gradients(case: Case, expected: Truth) -> None:
    """The user's gradients are those of the model alone, bit for bit."""
    for name, p in case.model.named_parameters():
        if p.grad is None:
            assert expected.gradients[name] is None, name
        else:
            assert torch.equal(p.grad, expected.gradients[name]), name
