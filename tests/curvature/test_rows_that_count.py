"""Masks take terms away, not rows; rows of one example are summed before they are squared, however a model lays them out."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

from tests import reference
from tests.support import bare_kfac, close, estimate

DOUBLE = torch.float64


class Mixing(nn.Module):
    """Positions see those before them, as in recurrent nets and under causal attention."""

    def __init__(self, *, time_first: bool = False) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.time_first = time_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.time_first:
            x = x.transpose(0, 1)
        out = self.head(self.norm(self.inner(x).tanh().cumsum(0 if self.time_first else 1)))
        return out.transpose(0, 1) if self.time_first else out


def sequences(batch: int = 4, time: int = 4) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, time, 3, dtype=DOUBLE)


def mixing(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return Mixing(**options).to(DOUBLE)


def last_position(batch: int, time: int) -> torch.Tensor:
    mask = torch.zeros(batch, time, dtype=torch.bool)
    mask[:, -1] = True
    return mask


MASKS = {
    "last": last_position(4, 4),
    "triangle": torch.ones(4, 4, dtype=torch.bool).tril(),
    "wholly masked examples": torch.tensor([[False] * 4, [True] * 4, [True, True, False, False], [False] * 4]),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("way", ["context", "outputs"])
@pytest.mark.parametrize("time_first", [False, True])
def test_positions_without_a_term_count_where_they_carry_gradient(time_first, way, mask, sharing):
    if time_first and sharing == "reduce":
        pytest.skip("the time steps are the examples then")
    expected = {n: reference.kronecker_factors(mixing(), sequences(), n, sharing=sharing, mask=mask) for n in ("inner", "head")}
    model = mixing(time_first=time_first)
    outputs = (lambda out: (out, mask)) if way == "outputs" else None
    # A random sign for each term: where terms mix, G is unbiased; one term for each example is exact.
    optimizer = bare_kfac(model, weight_sharing=sharing, outputs=outputs)
    with optimizer.masked(mask) if way == "context" else contextlib.nullcontext():
        model(sequences())
    optimizer.step()
    for name, (a, g) in expected.items():
        close(optimizer.curvature[name].input_factor, a)
        if mask is MASKS["last"] or (name == "head" and sharing == "expand"):
            close(optimizer.curvature[name].output_factor, g)


@pytest.mark.parametrize("name", ["inner", "norm", "head"])
def test_a_loss_at_the_last_position_gives_the_per_example_curvature_of_all_positions(name):
    """EKFAC's trace is that of the exact block in any basis: 1.3 instead of 13.9 where rows went with their terms."""
    mask = last_position(4, 4)
    model = mixing()
    exact = exact_trace(model, sequences(), getattr(model, name), mask)
    optimizer = bare_kfac(model, curvature="eigenbasis")
    with optimizer.masked(mask):
        model(sequences())
    optimizer.step()
    close(optimizer.curvature[name].to_dense().trace(), exact)


def exact_trace(model: nn.Module, x: torch.Tensor, module: nn.Module, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Trace of the exact Fisher block of a module's parameters: squared gradients of root columns, example by example."""
    total, terms = torch.zeros((), dtype=DOUBLE), 0
    for n in range(len(x)):
        outputs = model(x[n : n + 1])[0]
        hessian, count = reference.example_hessian("categorical", outputs.detach(), None, None if mask is None else mask[n])
        values, vectors = torch.linalg.eigh(hessian)
        for value, vector in zip(values, vectors.T):
            grads = torch.autograd.grad(outputs.reshape(-1) @ vector, list(module.parameters()), retain_graph=True)
            total = total + value.clamp_min(0.0) * sum(g.square().sum() for g in grads)
        terms += count
    return total / terms


def test_a_mask_of_ones_is_no_mask():
    model, found = mixing(), []
    for mask in (None, torch.ones(4, 4, dtype=torch.bool)):
        twin = copy.deepcopy(model)
        optimizer = bare_kfac(twin, outputs=lambda out, mask=mask: (out, mask))
        estimate(optimizer, twin, sequences())
        found.append([optimizer.curvature[n].to_dense() for n in ("inner", "norm", "head")])
    for one, other in zip(*found):
        assert torch.equal(one, other)


def test_reduced_factors_are_those_of_the_examples_that_are_not_masked_wholly():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(DOUBLE), sequences(8, 3)
    mask = (torch.arange(8) < 2)[:, None].expand(8, 3)
    found = []
    for part, kept in ((x, mask), (x[:2], None)):
        twin = copy.deepcopy(model)
        optimizer = bare_kfac(twin, weight_sharing="reduce", fisher="empirical", outputs=lambda out, kept=kept: (out, kept))
        nn.functional.cross_entropy(twin(part)[:2].flatten(0, 1), torch.arange(6) % 3).backward()
        optimizer.step()
        found.append([optimizer.curvature[n].to_dense() for n in "02"])
    for one, other in zip(*found):
        close(one, other)


class Frames(nn.Module):
    """Positions of an example, each by the same layers, flattened behind the batch or not; one loss term an example."""

    def __init__(self, kind: str, *, flat: bool) -> None:
        super().__init__()
        self.layer: nn.Module = {
            "linear": lambda: nn.Linear(6, 4),
            "convolution": lambda: nn.Conv1d(2, 4, 3),
            "layer norm": lambda: nn.LayerNorm(6),
            "group norm": lambda: nn.GroupNorm(1, 2),
            "embedding": lambda: nn.Embedding(5, 4),
        }[kind]()
        self.flat, self.kind = flat, kind
        self.head = nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "embedding":
            x = x[..., 0, 0].abs().mul(3).long() % 5
        elif self.kind in ("linear", "layer norm"):
            x = x.flatten(2)
        batch = x.shape[0]
        if self.flat:
            h = self.layer(x.flatten(0, 1)).unflatten(0, (batch, -1))
        else:
            h = torch.stack([self.layer(part) for part in x.unbind(1)], 1)
        return self.head(h.flatten(2).tanh().cumsum(1)[:, -1])


def frames(kind: str, *, flat: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Frames(kind, flat=flat).to(DOUBLE), torch.randn(4, 3, 2, 3, dtype=DOUBLE)
    model(x)
    return model, x


@pytest.mark.parametrize("curvature", ["eigenbasis", "kronecker"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "layer norm", "group norm", "embedding"])
def test_positions_flattened_behind_the_batch_are_read_batch_major(kind, sharing, curvature):
    found = []
    for flat in (False, True):
        model, x = frames(kind, flat=flat)
        exact = exact_trace(model, x, model.layer)
        optimizer = bare_kfac(model, curvature=curvature, weight_sharing=sharing)
        estimate(optimizer, model, x)
        block = optimizer.curvature["layer"].to_dense()
        if curvature == "eigenbasis" or "norm" in kind:
            close(block.trace(), exact)
        found.append(block)
    if sharing == "expand" or "norm" in kind:  # else several calls are averaged one by one, positions of one call together
        close(found[1], found[0])


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_reduced_factors_of_flattened_positions_equal_those_of_positions(kind):
    """The oracle reads the flattened rows of one example as its positions."""
    model, x = frames(kind, flat=True)
    module = copy.deepcopy(model.layer)
    inputs, gradients = [], []
    for n in range(len(x)):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = model.layer.register_forward_hook(lambda _m, args, out, seen=seen: seen.append((args[0], out)))
        outputs = model(x[n : n + 1])[0]
        handle.remove()
        ((given, out),) = seen
        inputs.append(torch.cat([reference.input_rows(module, one)[:, 0] for one in given]).mean(0))
        hessian, _ = reference.example_hessian("categorical", outputs.detach())
        rows = [torch.autograd.grad(o, out, retain_graph=True)[0] for o in outputs]
        jacobian = torch.stack([torch.cat([reference.output_rows(module, one)[:, 0] for one in g]).sum(0) for g in rows])
        gradients.append(jacobian.T @ hessian @ jacobian)
    optimizer = bare_kfac(model, weight_sharing="reduce")
    estimate(optimizer, model, x)
    a = torch.stack(inputs)
    view = optimizer.curvature["layer"]
    close(view.input_factor, a.square().mean(0) if kind == "embedding" else a.T @ a / len(x))
    close(view.output_factor, torch.stack(gradients).mean(0))


class Shrinking(nn.Module):
    """A recurrent loop over sequences of falling length: each step takes the examples that are left."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = nn.Embedding(5, 4) if kind == "embedding" else nn.Linear(6, 4)
        self.norm, self.head, self.kind = nn.LayerNorm(4), nn.Linear(4, 3), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = x[:, 0, -1].long()
        state = x.new_zeros(len(x), 4)
        for t in range(int(lengths.max())):
            left = int((lengths > t).sum())
            step = torch.cat([x[:left, t, :2], state[:left]], 1)
            if self.kind == "embedding":
                step = x[:left, t, 0].abs().mul(3).long() % 5
            state = torch.cat([self.norm(self.cell(step).tanh() + state[:left]), state[left:]])
        return self.head(state)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("name", ["cell", "norm", "head"])
def test_a_loop_whose_batch_shrinks_pairs_its_calls_by_the_leading_index(kind, name):
    torch.manual_seed(0)
    model, x = Shrinking(kind).to(DOUBLE), torch.randn(4, 4, 3, dtype=DOUBLE)
    x[:, 0, -1] = torch.tensor([4.0, 3.0, 3.0, 1.0])
    exact = exact_trace(model, x, getattr(model, name))
    optimizer = bare_kfac(model, curvature="eigenbasis")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(optimizer, model, x)
    close(optimizer.curvature[name].to_dense().trace(), exact)


class Packed(nn.Module):
    """Five rows for three examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.layer(x.flatten(0, 1)[:5])
        return self.head(torch.stack([rows[:2].sum(0), rows[2:3].sum(0), rows[3:].sum(0)]))


def test_rows_of_unknown_examples_are_named_once():
    model = Packed().to(DOUBLE)
    optimizer = bare_kfac(model, curvature="eigenbasis")
    with pytest.warns(UserWarning, match=r"'layer' gets \(5\) is no multiple of the 3 examples"):
        estimate(optimizer, model, sequences(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(optimizer, model, sequences(3))


def test_factors_that_need_no_examples_and_tables_of_positions_are_not_warned_of():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.table(torch.arange(x.shape[1]))).mean(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Packed().to(DOUBLE)
        estimate(bare_kfac(model), model, sequences(3))
        model = Positions().to(DOUBLE)
        estimate(bare_kfac(model, curvature="eigenbasis"), model, sequences(3, 5))


def test_reduced_token_frequencies_keep_double_precision():
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 1, 1], [3, 2, 1], [4, 4, 4], [2, 0, 1]])
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 3)).to(DOUBLE)
    optimizer = bare_kfac(model, weight_sharing="reduce")
    estimate(optimizer, model, tokens)
    frequencies = torch.nn.functional.one_hot(tokens, 5).double().mean(1)
    torch.testing.assert_close(optimizer.curvature["0"].input_factor, frequencies.square().mean(0), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_inputs_wait_for_the_gradients_only_under_a_mask(masked):
    """Else checkpointing could not free them."""
    model, waiting = mixing(), []
    optimizer = bare_kfac(model)

    def look(_module: nn.Module, _args: tuple[torch.Tensor, ...]) -> None:
        waiting.append(sum(call.x.numel() for call in optimizer._workings.capture._running.current.calls["inner"]))

    for _ in range(2):  # the first pass is also held against the adapters
        handle = model.head.register_forward_pre_hook(look)
        with optimizer.masked(MASKS["triangle"]) if masked else contextlib.nullcontext():
            logits = model(sequences())
        handle.remove()
        optimizer.zero_grad()
        logits.sum().backward()
        optimizer.step()
    assert waiting[-1] == (sequences().numel() if masked else 0)
