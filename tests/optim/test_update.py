"""The update: identity is torch's SGD bit for bit; clip, momentum, bound and decay in the order of the contract."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from tests.support import bare_kfac, close, data, mlp, train_step, weights

DOUBLE = torch.float64
STEPS = 6


def batches(count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [data(8, seed=s) for s in range(count)]


# ---------------------------------------------------------------------------------------------
# identity


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay", "maximize", "foreach"),
    [
        (m, n, w, x, f)
        for m, n, w, x, f in itertools.product((0.0, 0.9), (False, True), (0.0, 0.1), (False, True), (None, False, True))
        if not (n and m == 0.0)
    ],
)
def test_identity_is_torchs_sgd_bit_for_bit(momentum, nesterov, weight_decay, maximize, foreach):
    common = {
        "lr": 0.05,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    ours, theirs = mlp(torch.float32), mlp(torch.float32)
    kfac = KFAC(ours, curvature="identity", decoupled_weight_decay=False, foreach=foreach, **common)
    sgd = torch.optim.SGD(theirs.parameters(), foreach=False, **common)
    for x, y in batches():
        train_step(kfac, ours, x.float(), y)
        train_step(sgd, theirs, x.float(), y)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


def test_identity_needs_no_estimates():
    model = mlp()
    optimizer = KFAC(model, curvature="identity")
    assert len(optimizer.curvature) == 0
    for m in model.modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks


def test_identity_without_momentum_ignores_nesterov_as_the_default_says():
    ours, theirs = mlp(), mlp()
    kfac = KFAC(ours, curvature="identity", lr=0.1, momentum=0.0, weight_decay=0.0)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for x, y in batches(3):
        train_step(kfac, ours, x, y)
        train_step(sgd, theirs, x, y)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_decoupled_decay_is_that_of_adamw():
    """``W <- (1 - lr * decay) W`` before the step; with a zero gradient nothing else happens."""
    model = mlp()
    optimizer = KFAC(model, curvature="identity", lr=0.1, momentum=0.0, weight_decay=0.3)
    before = weights(model)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        close(p.detach(), (1 - 0.1 * 0.3) * before[name])


# ---------------------------------------------------------------------------------------------
# the whole rule against a simulation that takes directions from a twin


def simulate(
    twin: nn.Module,
    directions: KFAC,
    x: torch.Tensor,
    y: torch.Tensor,
    buffers: dict[str, torch.Tensor],
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    kl_clip: float | None = None,
    bound: float | None = None,
    maximize: bool = False,
) -> float:
    """One step of the contract's update on ``twin``; returns the clip factor."""
    directions.zero_grad()
    loss = F.cross_entropy(twin(x), y)
    (-loss if maximize else loss).backward()
    with torch.no_grad():
        if not decoupled:
            for p in twin.parameters():
                p.grad.add_(p, alpha=weight_decay)
        v = {n: p.grad.clone() for n, p in twin.named_parameters()}
        directions.precondition_gradients_()
        d = {n: p.grad.clone() for n, p in twin.named_parameters()}
        quadratic = sum(float((v[n] * d[n]).sum()) for n in v)
        scale = 1.0 if kl_clip is None else min(1.0, math.sqrt(kl_clip / (lr**2 * quadratic)))
        update = {}
        for n in d:
            buffers[n] = momentum * buffers.get(n, torch.zeros_like(d[n])) + scale * d[n]
            update[n] = scale * d[n] + momentum * buffers[n] if nesterov else buffers[n].clone()
        for layer in sorted({n.split(".")[0] for n in d}):
            names = [n for n in d if n.startswith(layer + ".")]
            if bound is not None:
                length = lr * math.sqrt(sum(float(update[n].square().sum()) for n in names))
                size = math.sqrt(sum(float(twin.get_parameter(n).square().sum()) for n in names))
                factor = min(1.0, bound * size / length)
                for n in names:
                    update[n] *= factor
            for n in names:
                p = twin.get_parameter(n)
                if decoupled:
                    p.mul_(1 - lr * weight_decay)
                p.sub_(update[n], alpha=lr)
    return scale


CURVATURE = {"damping": 0.05, "factor_decay": 0.9}
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": False},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "clip": {"kl_clip": 1e-3},
    "clip before momentum": {"kl_clip": 1e-3, "momentum": 0.8, "nesterov": True},
    "clip before heavy-ball momentum": {"kl_clip": 1e-3, "momentum": 0.9, "nesterov": False},
    "bound": {"bound": 0.02},
    "bound after momentum": {"bound": 0.02, "momentum": 0.9, "nesterov": True},
    "bound after heavy-ball momentum": {"bound": 0.02, "momentum": 0.9, "nesterov": False},
    "decoupled decay": {"weight_decay": 0.1, "decoupled": True},
    "bound before decoupled decay": {"weight_decay": 0.1, "decoupled": True, "bound": 0.02},
    "coupled decay": {"weight_decay": 0.1, "decoupled": False},
    "coupled decay enters the clip": {"weight_decay": 0.1, "decoupled": False, "kl_clip": 1e-3},
    "maximize": {"maximize": True, "momentum": 0.5},
    "everything": {"kl_clip": 1e-2, "momentum": 0.8, "nesterov": True, "bound": 0.05, "weight_decay": 0.01},
}


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("rule", RULES)
def test_step_follows_the_contract(rule, foreach, curvature):
    options = dict(RULES[rule])
    ours, twin = mlp(), mlp()
    names = {"bound": "max_relative_update", "decoupled": "decoupled_weight_decay"}
    optimizer = bare_kfac(
        ours,
        lr=0.3,
        curvature=curvature,
        foreach=foreach,
        **CURVATURE,
        **{names.get(k, k): v for k, v in options.items()},
    )
    directions = bare_kfac(twin, curvature=curvature, **CURVATURE)
    buffers: dict[str, torch.Tensor] = {}
    scales = []
    for x, y in batches():
        train_step(optimizer, ours, x, y)
        scales.append(simulate(twin, directions, x, y, buffers, lr=0.3, **options))
        for p, q in zip(ours.parameters(), twin.parameters()):
            close(p.detach(), q.detach(), rtol=1e-9)
    if options.get("kl_clip") == 1e-3:
        assert min(scales) < 0.9, "the clip must be active in this test"


def test_weight_decay_follows_the_learning_rate():
    model = mlp()
    optimizer = KFAC(model, curvature="identity", lr=0.0, momentum=0.0, weight_decay=0.3)
    before = weights(model)
    x, y = data()
    train_step(optimizer, model, x, y)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------
# the bounds as properties


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 100.0])
def test_no_layer_moves_further_than_max_relative_update(lr, curvature):
    model = mlp()
    optimizer = bare_kfac(model, lr=lr, damping=1e-4, momentum=0.9, max_relative_update=0.03, curvature=curvature)
    for x, y in batches():
        before = weights(model)
        train_step(optimizer, model, x, y)
        for name in ("0", "2"):
            keys = [[f"{name}.weight", f"{name}.bias"]] if curvature != "diagonal" else [[f"{name}.weight"]]
            for group in keys:
                moved = torch.cat([(model.get_parameter(n).detach() - before[n]).reshape(-1) for n in group]).norm()
                size = torch.cat([before[n].reshape(-1) for n in group]).norm()
                assert moved <= 0.03 * size * (1 + 1e-9)


def test_the_bound_leaves_the_momentum_buffer_alone():
    """After the bound is lifted the step is that of the same run without a bound, from the same weights."""
    x, y = data()
    zero = []
    for bound in (None, 1e-6):
        model = mlp()
        optimizer = bare_kfac(model, lr=1e-12, momentum=0.9, max_relative_update=bound)
        for _ in range(3):
            train_step(optimizer, model, x, y)
        for group in optimizer.param_groups:
            group["lr"], group["max_relative_update"] = 0.1, None
        before = weights(model)
        train_step(optimizer, model, x, y)
        zero.append({n: p.detach() - before[n] for n, p in model.named_parameters()})
    for n in zero[0]:
        close(zero[1][n], zero[0][n], rtol=1e-6)  # weights differ by 1e-12 relative before the last step


def test_layers_initialised_at_zero_can_move():
    model = mlp()
    with torch.no_grad():
        for p in model[2].parameters():
            p.zero_()
    optimizer = KFAC(model, lr=0.1, max_relative_update=0.05)
    losses = []
    x, y = data(32)
    for _ in range(60):
        losses.append(train_step(optimizer, model, x, y))
    assert model[2].weight.abs().max() > 1e-2
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("shape", "outputs"), [((6, 2), 6), ((1, 1, 6), 6), ((6, 1, 1), 6), ((6,), 6), ((), 1)])
def test_parameters_of_their_own_that_start_at_zero_move_as_far_as_a_layer_of_their_size(shape, outputs):
    """``max_relative_update`` times the floor ``0.1 sqrt(out_dim)``, reached because nothing else bounds the step."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.head = nn.Parameter(torch.zeros(shape, dtype=torch.float64)), nn.Linear(4, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x) * (1 + self.shift.sum())

    model = Shifted()
    optimizer = bare_kfac(model, lr=1e6, max_relative_update=0.05)
    train_step(optimizer, model, *data())
    assert float(model.shift.detach().norm()) == pytest.approx(0.05 * 0.1 * outputs**0.5, rel=1e-6)


def test_kl_clip_bounds_the_quadratic_form_of_the_step():
    """``lr² <V, s d> s <= kl_clip``, with equality where the clip is active."""
    model, twin = mlp(), mlp()
    x, y = data()
    optimizer = bare_kfac(model, lr=1.0, kl_clip=1e-4, damping=1e-3)
    directions = bare_kfac(twin, damping=1e-3)
    before = weights(model)
    train_step(optimizer, model, x, y)
    F.cross_entropy(twin(x), y).backward()
    v = {n: p.grad.clone() for n, p in twin.named_parameters()}
    directions.precondition_gradients_()
    step = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    d = {n: p.grad for n, p in twin.named_parameters()}
    # step = s d, so <V, step> <step, d> / <d, d> = s² <V, d>
    s = sum(float((step[n] * d[n]).sum()) for n in d) / sum(float((d[n] ** 2).sum()) for n in d)
    assert s**2 * sum(float((v[n] * d[n]).sum()) for n in d) == pytest.approx(1e-4, rel=1e-9)


def test_the_clip_is_one_factor_per_group_with_its_own_lr_and_kl_clip():
    def groups(net: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": list(net[0].parameters()), "lr": 1.0, "kl_clip": 1e-4},
            {"params": list(net[2].parameters()), "lr": 0.1, "kl_clip": None},
        ]

    model, twin = mlp(), mlp()
    x, y = data()
    optimizer = bare_kfac(model, groups(model))
    directions = bare_kfac(twin)
    before = weights(model)
    train_step(optimizer, model, x, y)
    F.cross_entropy(twin(x), y).backward()
    v = {n: p.grad.clone() for n, p in twin.named_parameters()}
    directions.precondition_gradients_()
    quadratic = sum(float((v[n] * twin.get_parameter(n).grad).sum()) for n in ("0.weight", "0.bias"))
    s = min(1.0, math.sqrt(1e-4 / quadratic))
    assert s < 1
    for name, lr, scale in (("0.weight", 1.0, s), ("0.bias", 1.0, s), ("2.weight", 0.1, 1.0), ("2.bias", 0.1, 1.0)):
        close(model.get_parameter(name).detach(), before[name] - lr * scale * twin.get_parameter(name).grad, rtol=1e-9)


def test_a_zero_learning_rate_moves_nothing_and_does_not_divide_by_zero():
    model = mlp()
    optimizer = KFAC(model, lr=0.0)
    before = weights(model)
    x, y = data()
    for _ in range(3):
        train_step(optimizer, model, x, y)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_zero_gradient_gives_no_step_and_nothing_non_finite():
    model = mlp()
    optimizer = KFAC(model)
    x, _ = data()
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        (0 * model(x).sum()).backward()
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_layer_without_curvature_takes_the_plain_gradient():
    """Estimates dropped from the start: the first steps are bounded SGD steps, not nothing."""
    model = mlp()
    optimizer = bare_kfac(model, lr=0.1, factor_interval=1)
    x, y = data()
    before = weights(model)
    optimizer.zero_grad()
    with optimizer.paused():
        F.cross_entropy(model(x), y).backward()
    g = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    for n, p in model.named_parameters():
        close(p.detach(), before[n] - 0.1 * g[n])


def test_the_plain_gradient_before_the_first_estimate_is_bounded_by_default():
    model = mlp()
    optimizer = KFAC(model, lr=1.0)
    before = weights(model)
    with optimizer.paused():
        (1e6 * F.cross_entropy(model(data()[0]), data()[1])).backward()
    optimizer.step()
    for n, p in model.named_parameters():
        assert (p.detach() - before[n]).norm() <= before[n].norm()


def test_maximize_goes_uphill():
    model = mlp()
    x, y = data()
    optimizer = KFAC(model, lr=0.05, maximize=True)
    losses = [train_step(optimizer, model, x, y) for _ in range(10)]
    assert losses[-1] > losses[0]


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_gradients_are_left_as_the_user_computed_them(curvature):
    model, twin = mlp(), mlp()
    x, y = data()
    optimizer = KFAC(model, curvature=curvature, weight_decay=0.1, decoupled_weight_decay=False)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_foreach_equals_single_tensor_bit_for_bit():
    results = []
    for foreach in (False, True):
        model = mlp(torch.float32)
        optimizer = KFAC(model, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=foreach)
        for x, y in batches(12):
            train_step(optimizer, model, x.float(), y)
        results.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*results))
