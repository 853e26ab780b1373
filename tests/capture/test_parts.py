"""The parts of the capture, each by itself: no optimizer, no backward of a user."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from kfac_opt._capture.calls import recorded
from kfac_opt._capture.collect import collect
from kfac_opt._capture.collector import Collector, unnoticed
from kfac_opt._capture.finite import all_finite
from kfac_opt._capture.passes import Pass
from kfac_opt._capture.running import Running
from kfac_opt._capture.status import LayerStatuses
from kfac_opt._curvature.block import Statistics
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt.layers import find_adapter
from kfac_opt.likelihoods import make_likelihood


@dataclass
class Entry:
    """A layer with its block, as the collector asks for it."""

    name: str
    block: KroneckerBlock
    weight: nn.Parameter
    bias: nn.Parameter | None
    module: nn.Module
    part: str | None = None


def make(fisher="exact") -> tuple[nn.Linear, Collector, dict[str, Entry]]:
    model = nn.Linear(4, 3).double()
    adapter = find_adapter(model)(model, True)
    block = KroneckerBlock(adapter, torch.float64, "expand", style="exact", max_factor_dim=8)
    entry = Entry("layer", block, model.weight, model.bias, model)
    likelihood = make_likelihood("categorical")
    collector = Collector(model, likelihood, fisher, 1, None, "mean", lambda _, device: torch.Generator(device))
    return model, collector, {"layer": entry}


def hooks_of(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


# -- the status of a layer --------------------------------------------------------------------------------------


def test_what_passes_tell_holds_when_their_step_is_over():
    statuses = LayerStatuses()
    statuses["a"].proof = statuses["b"].proof = "told"
    statuses["b"].foreign = "uses"  # another pass of the same step contradicts
    assert statuses.proven == set()
    statuses.confirm()
    statuses.start_step()
    assert statuses.proven == {"a"}
    assert statuses["b"].proof == "open"
    assert statuses.foreign == {"b": "uses"}
    statuses.forget_proofs()
    assert statuses.proven == set()


def test_a_step_without_its_end_tells_nothing():
    statuses = LayerStatuses()
    statuses["a"].proof = "told"
    statuses.start_step()
    statuses.confirm()
    assert statuses.proven == set()


def test_layers_that_only_ran_hidden_are_unseen_until_the_step_is_over():
    statuses = LayerStatuses()
    statuses["a"].hidden = statuses["b"].hidden = statuses["b"].ran = True
    assert (statuses.hidden, statuses.ran, statuses.unseen) == ({"a", "b"}, {"b"}, {"a"})
    statuses.start_step()
    assert (statuses.hidden, statuses.ran, statuses.unseen) == (set(), {"b"}, set())


# -- a pass under way -------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Calls itself ``depth`` times and notes what :class:`Running` says of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.entered, self.left = Running(), [], []

    def forward(self, depth: int) -> None:
        self.entered.append(self.running.enter(self))
        if self.entered[-1]:
            self.running.current = Pass()
        if depth:
            self(depth - 1)
        self.left.append(self.running.leave() is not None)


def test_a_model_that_calls_itself_is_one_pass():
    model = Nested()
    model(2)
    assert model.entered == [True, False, False]
    assert model.left == [False, False, True]
    assert model.running.current is None


def test_a_pass_that_an_interrupt_left_does_not_take_in_the_next():
    model = Nested()
    model.running.enter(model)  # and never left
    model.running.current = Pass()
    model(1)
    assert model.entered == [True, False]
    assert model.left == [False, True]


# -- sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_entry_that_is_not_finite_is_found(value):
    good = Statistics({"input": torch.eye(3).expand(2, 3, 3), "square": torch.ones(4)})
    assert all_finite([good])
    assert all_finite([])
    assert not all_finite([good, Statistics({"square": torch.tensor([1.0, value])})])
    assert not all_finite([good, Statistics({}, examples=[([], [torch.tensor([value])], 1.0)])])


def test_sums_over_data_are_those_of_its_rows_in_evaluation_mode_and_without_gradients():
    torch.manual_seed(0)
    model, collector, entries = make()
    model.eval()
    batches, seen = [torch.randn(n, 4, dtype=torch.float64) for n in (5, 2)], []
    with torch.no_grad():
        passes = [(lambda x=x: seen.append(model(x)), None) for x in batches]
        pending = collect(collector, entries, {"layer": None}, passes)
    rows = torch.cat([torch.cat(batches), torch.ones(7, 1, dtype=torch.float64)], dim=1)
    probabilities = torch.cat(seen).softmax(-1)
    hessian = torch.diag(probabilities.sum(0)) - probabilities.T @ probabilities
    sums = pending.statistics["layer"].sums
    assert pending.num_terms == 7
    assert hooks_of(model) == 0
    assert not collector.any_mode
    torch.testing.assert_close(sums["input"][0], rows.T @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums["output"][0], hessian.detach(), rtol=1e-10, atol=1e-12)


def test_masked_terms_do_not_count_and_hooks_go_when_a_pass_raises():
    torch.manual_seed(0)
    model, collector, entries = make()
    x = torch.randn(5, 4, dtype=torch.float64)
    keep = torch.tensor([True, False, True, True, False])
    assert collect(collector, entries, {}, [(lambda: model(x), keep)]).num_terms == 3
    assert collect(collector, entries, {}, [(lambda: model(x), None)]).num_terms == 5
    with pytest.raises(RuntimeError, match="shapes"):
        collect(collector, entries, {}, [(lambda: model(x[:, :2]), None)])
    assert hooks_of(model) == 0


# -- layers' calls ----------------------------------------------------------------------------------------------


def test_calls_are_recorded_in_their_order_and_hooks_go():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    x = torch.randn(3, 2)

    def keep(name: str, seen: Tensor, out: Tensor) -> tuple[int, bool] | None:
        return (len(seen), out.requires_grad) if len(seen) != 2 else None

    with recorded({"0": model[0]}, keep) as calls, torch.no_grad():
        model(x), model(x[:2])
        model[0](input=x[:1])
    assert calls == {"0": [(3, False), (1, False)]}
    with pytest.raises(RuntimeError), recorded({"0": model[0]}, keep):
        model(x[:, :1])
    assert hooks_of(model[0]) == 0


def test_what_happens_unnoticed_is_no_pass():
    model, collector, entries = make()
    collector.attach(entries, {})
    x = torch.randn(2, 4, dtype=torch.float64)
    with unnoticed(model):
        model(x)
    assert not collector.forward_seen
    assert not collector.paused
    assert collector.take().missed == {"paused"}
    model(x)
    assert collector.forward_seen
    assert collector.take().num_terms == 2


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_collector_is_freed_with_its_last_reference_and_its_hooks_with_it(fisher):
    model, collector, entries = make(fisher)
    collector.attach(entries, {})
    model(torch.randn(2, 4, dtype=torch.float64))
    assert hooks_of(model) == 3
    del collector  # no cycle: nothing waits for the garbage collector
    assert hooks_of(model) == 0
