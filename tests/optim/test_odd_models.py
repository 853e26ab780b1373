"""Models whose inputs or outputs are not the plain batch of rows: nested, sparse, losses, carried states, scripts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from tests import reference
from tests.support import bare_kfac, close, data, estimate, mlp, train_step


class Pooled(nn.Module):
    """A layer on examples of different lengths, whose mean goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return self.head(torch.tanh(torch.stack([part.mean(0) for part in hidden.unbind()]) if x.is_nested else hidden))


def nested(layout: torch.layout) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nested.nested_tensor([torch.randn(n, 4, generator=generator) for n in (2, 3, 4)], layout=layout)


IRREGULAR: dict[str, Callable[[], Tensor]] = {
    "jagged": lambda: nested(torch.jagged),
    "nested": lambda: nested(torch.strided),
    "sparse": lambda: data(batch=3, dtype=torch.float32)[0].relu().to_sparse(),
    "sparse rows": lambda: data(batch=3, dtype=torch.float32)[0].relu().to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta).*:UserWarning")
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_layer_on_nested_or_sparse_tensors_gets_diagonal_curvature_and_is_named(kind, fisher):
    x, y, model = IRREGULAR[kind](), torch.arange(3), Pooled()
    optimizer = KFAC(model, fisher=fisher, factor_interval=1)
    with pytest.warns(UserWarning, match=r"'inner' takes or returns nested or sparse tensors.*diagonal"):
        train_step(optimizer, model, x, y)
    losses = [train_step(optimizer, model, x, y) for _ in range(5)]
    assert list(optimizer.curvature) == ["inner.weight", "inner.bias", "head"]
    assert float(optimizer.curvature["inner.weight"].diagonal.sum()) > 0
    assert losses[-1] < losses[0]


def test_the_diagonal_of_a_layer_on_sparse_rows_is_that_of_the_dense_ones():
    model = Pooled().double()
    x = data(batch=1)[0].relu()
    expected = reference.parameter_fisher_diagonal(model, x, model.inner.weight)
    optimizer = bare_kfac(model)
    with pytest.warns(UserWarning, match="sparse"):
        train_step(optimizer, model, x.to_sparse(), torch.tensor([1]))
    estimate(optimizer, model, x.to_sparse())
    close(optimizer.curvature["inner.weight"].diagonal, expected)


class Detector(nn.Module):
    """Returns its losses while it trains, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.body(x)))
        return {"classifier": F.cross_entropy(logits, y), "size": 1e-3 * logits.square().mean()}


def test_a_model_of_losses_is_told_how_to_give_its_logits_and_that_works():
    x, y = data(dtype=torch.float32)
    model = Detector()
    optimizer = KFAC(model)
    with pytest.raises(TypeError, match=r"losses \['classifier', 'size'\].*register_forward_hook.*outputs=lambda losses"):
        model(x, y)
    optimizer.detach()
    kept: dict[str, Tensor] = {}
    model.head.register_forward_hook(lambda module, inputs, output: kept.update(logits=output))
    optimizer = KFAC(model, outputs=lambda losses: kept["logits"], factor_interval=1)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(x, y)["classifier"]
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    assert found[-1] < found[0]
    assert all(float(view.to_dense().diagonal().sum()) > 0 for view in optimizer.curvature.values())


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4 + 5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, state: Tensor) -> dict[str, Tensor]:
        state = torch.tanh(self.inner(torch.cat([x, state], dim=1)))
        return {"logits": self.head(state), "state": state}


def unroll(model: nn.Module, optimizer: KFAC, *, detach: bool) -> None:
    x, y = data(dtype=torch.float32)
    optimizer.zero_grad()
    state, loss = torch.zeros(8, 5), torch.zeros(())
    for _ in range(3):
        out = model(x, state)
        loss = loss + F.cross_entropy(out["logits"], y) / 3
        state = out["state"].detach() if detach else out["state"]
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("proven", [False, True])
def test_a_state_that_carries_its_graph_from_call_to_call_is_said_once(proven):
    model = Cell()
    optimizer = KFAC(model, factor_interval=1)
    if proven:
        unroll(model, optimizer, detach=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            unroll(model, optimizer, detach=False)
    carried = [w for w in said if "carries a graph that leads to the model's own parameters" in str(w.message)]
    uses = [w for w in said if "the weight of 'inner' enters the outputs in ways" in str(w.message)]
    assert len(carried) == 1
    assert len(uses) == (0 if proven else 1)
    assert len(said) == len(carried) + len(uses)


@pytest.mark.parametrize("kind", ["detached state", "another model's graph", "a leaf"])
def test_inputs_that_do_not_lead_to_the_model_are_right(kind):
    model = Cell() if kind == "detached state" else mlp(torch.float32)
    optimizer = KFAC(model, factor_interval=1)
    before = nn.Linear(4, 4)
    x, y = data(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            if kind == "detached state":
                unroll(model, optimizer, detach=True)
            else:
                train_step(optimizer, model, before(x) if kind == "another model's graph" else x.clone().requires_grad_(), y)


def test_the_empirical_fisher_takes_a_carried_state_from_the_one_backward():
    model = Cell()
    optimizer = KFAC(model, factor_interval=1, fisher="empirical")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            unroll(model, optimizer, detach=False)
    assert list(optimizer.curvature) == ["inner", "head"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripting_a_model_with_hooks_says_how_it_can_be_done():
    model = mlp(torch.float32)
    optimizer = KFAC(model)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile.*optimizer\.detach\(\)"):
        torch.jit.script(model)
    copied = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile.*copied with them on"):
        torch.jit.script(copied)
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    x = data(dtype=torch.float32)[0]
    assert torch.equal(torch.jit.script(copied)(x), model(x))
    optimizer.detach()
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_a_hook_has_no_name_for_anybody_else():
    model = mlp(torch.float32)
    optimizer = KFAC(model)
    hooks = list(model[0]._forward_hooks.values())
    assert [getattr(hook, "__name__", "none") for hook in hooks] == ["none"] * len(hooks)
    assert optimizer.curvature
