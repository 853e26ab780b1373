"""What torch's own optimizers do: hooks, groups, names, representation, life time, preconditioning alone."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from kfac_opt import KFAC
from tests.support import assert_same, bare_kfac, close, data, gradients, mlp, train_step, weights


def test_it_is_a_torch_optimizer():
    optimizer = KFAC(mlp())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "lr" in optimizer.defaults
    assert "momentum" in optimizer.defaults
    assert "KFAC" in repr(optimizer)
    assert "damping" in repr(optimizer)


def test_partial_with_the_model_is_an_optimizer_factory():
    model = mlp()
    factory = functools.partial(KFAC, model)
    optimizer = factory(model.parameters(), lr=0.1)
    train_step(optimizer, model, *data())
    optimizer.detach()
    assert [
        len(g["params"]) for g in factory([{"params": model[0].parameters()}, {"params": model[2].parameters()}]).param_groups
    ] == [2, 2]


def test_params_may_be_a_generator_a_list_groups_or_named():
    model = mlp()
    for params in (
        model.parameters(),
        list(model.parameters()),
        [{"params": model.parameters(), "lr": 0.2}],
        model.named_parameters(),
    ):
        optimizer = KFAC(model, params, lr=0.1)
        train_step(optimizer, model, *data())
        assert len(optimizer.curvature) == 2
        optimizer.detach()


def test_none_means_all_trainable_parameters():
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = KFAC(model)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("curvature", ["kronecker", "identity"])
def test_step_hooks_run_once_per_step(curvature):
    """A subclass whose ``step`` calls ``super().step()`` runs them twice."""
    model, calls = mlp(), []
    optimizer = KFAC(model, curvature=curvature)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    try:
        train_step(optimizer, model, *data())
    finally:
        handle.remove()
    assert calls[0] == "pre"
    assert sorted(calls) == ["global", "post", "pre"]


def test_state_dict_hooks_run():
    model, calls = mlp(), []
    optimizer = KFAC(model)
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "before", "after"]


def test_add_param_group_later():
    model = mlp()
    optimizer = bare_kfac(model, model[0].parameters(), lr=0.1)
    train_step(optimizer, model, *data())
    before = weights(model)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.05})
    assert set(optimizer.curvature) == {"0", "2"}
    for _ in range(2):
        train_step(optimizer, model, *data())
    assert not torch.equal(before["2.weight"], model[2].weight)
    assert optimizer.curvature["2"].to_dense().abs().sum() > 0
    assert optimizer.param_groups[1]["lr"] == 0.05
    assert optimizer.param_groups[1]["momentum"] == optimizer.param_groups[0]["momentum"]


def test_groups_have_their_own_learning_rate_momentum_decay_and_curvature():
    model = mlp()
    optimizer = bare_kfac(
        model,
        [
            {"params": model[0].parameters(), "lr": 0.1, "curvature": "eigenbasis"},
            {"params": model[2].parameters(), "lr": 0.0, "weight_decay": 0.5, "curvature": "diagonal"},
        ],
    )
    before = weights(model)
    train_step(optimizer, model, *data())
    assert sorted(optimizer.curvature) == ["0", "2.bias", "2.weight"]
    assert torch.equal(before["2.weight"], model[2].weight)
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_one_group_per_layer_equals_one_group():
    results = []
    for split in (False, True):
        model = mlp()
        groups = [{"params": m.parameters()} for m in (model[0], model[2])] if split else None
        optimizer = bare_kfac(model, groups, lr=0.1, momentum=0.9)
        for step in range(4):
            train_step(optimizer, model, *data(seed=step))
        results.append(weights(model))
    for n in results[0]:
        close(results[1][n], results[0][n])


def test_only_some_parameters_are_trained():
    model = mlp()
    optimizer = KFAC(model, model[2].parameters(), lr=0.1)
    before = weights(model)
    train_step(optimizer, model, *data())
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["2.weight"], model[2].weight)
    assert list(optimizer.curvature) == ["2"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = mlp()
    optimizer = KFAC(model)
    train_step(optimizer, model, *data())
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) == set_to_none for p in model.parameters())


def test_parameters_without_a_gradient_are_left_alone_even_with_momentum_and_decay():
    model = mlp()
    optimizer = KFAC(model, lr=0.1, momentum=0.9, weight_decay=0.1)
    train_step(optimizer, model, *data())
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    model[0].weight.grad = model[0].bias.grad = None
    optimizer.step()
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["2.weight"], model[2].weight)


def test_non_contiguous_parameters_and_gradients():
    model, twin = mlp(), mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().T.contiguous().T)
    assert not model[0].weight.is_contiguous()
    a, b = bare_kfac(model, lr=0.1, momentum=0.9), bare_kfac(twin, lr=0.1, momentum=0.9)
    for step in range(3):
        train_step(a, model, *data(seed=step))
        train_step(b, twin, *data(seed=step))
    for p, q in zip(model.parameters(), twin.parameters()):
        close(p.detach(), q.detach())


def test_channels_last_gradients():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double().to(memory_format=memory_format)
        x = torch.randn(4, 2, 4, 4, dtype=torch.float64).to(memory_format=memory_format)
        optimizer = bare_kfac(model, lr=0.1, momentum=0.9)
        for _ in range(3):
            train_step(optimizer, model, x, torch.tensor([0, 1, 2, 0]))
        results.append(weights(model))
    for n in results[0]:
        close(results[1][n], results[0][n])


# ---------------------------------------------------------------------------------------------
# preconditioning in front of another optimizer


def test_preconditioning_then_sgd_is_a_kfac_step():
    model, twin = mlp(), mlp()
    kfac = bare_kfac(model, lr=0.1)
    alone, sgd = bare_kfac(twin), torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(4):
        train_step(kfac, model, *data(seed=step))
        sgd.zero_grad()
        F.cross_entropy(twin(data(seed=step)[0]), data(seed=step)[1]).backward()
        alone.precondition_gradients_()
        sgd.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        close(p.detach(), q.detach())


def test_preconditioning_uses_neither_clip_nor_momentum_nor_decay_nor_learning_rate():
    results = []
    for options in (
        {},
        {"lr": 5.0, "momentum": 0.9, "weight_decay": 0.3, "kl_clip": 1e-6, "max_relative_update": 1e-6},
    ):
        model = mlp()
        optimizer = bare_kfac(model, **options)
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(data(seed=step)[0]), data(seed=step)[1]).backward()
            optimizer.precondition_gradients_()
        results.append(gradients(model))
    for n in results[0]:
        close(results[1][n], results[0][n])


def test_preconditioned_gradients_train_with_adam():
    model = mlp(torch.float32)
    kfac, adam = KFAC(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = data(32, dtype=torch.float32)
    losses = []
    for _ in range(100):
        adam.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition_gradients_()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------------------------------
# life time


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_detach_removes_every_hook():
    model = mlp()
    optimizer = KFAC(model)
    assert hook_count(model) > 0
    optimizer.detach()
    assert hook_count(model) == 0
    optimizer.detach()  # twice is fine
    model(data()[0])


def test_a_detached_optimizer_says_so():
    model = mlp()
    optimizer = KFAC(model)
    optimizer.detach()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    with pytest.raises(RuntimeError, match=r"(?s)detached.*KFAC\(model"):
        optimizer.step()


def test_an_optimizer_out_of_scope_frees_the_model():
    model = mlp()
    optimizer = KFAC(model)
    train_step(optimizer, model, *data())
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    model(data()[0])
    second = KFAC(model)
    train_step(second, model, *data())
    assert second.curvature["0"].to_dense().isfinite().all()


def test_a_model_and_its_optimizer_die_together():
    model = mlp()
    optimizer = KFAC(model)
    train_step(optimizer, model, *data())
    references = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_an_optimizer_that_dies_in_the_middle_of_a_step_leaves_a_usable_model():
    model = mlp()
    optimizer = KFAC(model)
    loss = F.cross_entropy(model(data()[0]), data()[1])
    del optimizer
    gc.collect()
    loss.backward()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Token:
    """Lives as long as the graph that it was made a part of."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, token: Token) -> torch.Tensor:
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def marked_pass(model: nn.Sequential) -> tuple[torch.Tensor, weakref.ref]:
    """A forward pass whose graph holds a token between the layers."""
    token = Token()
    handle = model[1].register_forward_hook(lambda _m, _a, out: Marked.apply(out, token))
    try:
        return model(data()[0]), weakref.ref(token)
    finally:
        handle.remove()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_no_graph_is_kept_alive_between_steps(curvature, fisher):
    """Statistics are transient: what a pass captured must be gone after the step."""
    model = mlp()
    optimizer = bare_kfac(model, curvature=curvature, fisher=fisher)
    output, graph = marked_pass(model)
    F.cross_entropy(output, data()[1]).backward()
    optimizer.step()
    assert graph() is not None
    del output
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_passes_whose_step_never_comes_keep_sums_and_no_graphs(curvature, fisher):
    model = mlp()
    optimizer = bare_kfac(model, curvature=curvature, fisher=fisher)
    graphs = [marked_pass(model)[1] for _ in range(5)]
    gc.collect()
    assert [g() for g in graphs] == [None] * 5
    assert optimizer.dropped_estimates == 0


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_two_optimizers_on_two_models_do_not_meet(curvature):
    first, second, alone = mlp(), mlp(), mlp()
    a, b, c = (KFAC(m, curvature=curvature) for m in (first, second, alone))
    for step in range(3):
        la = F.cross_entropy(first(data(seed=step)[0]), data(seed=step)[1])
        lb = F.cross_entropy(second(data(seed=step + 50)[0]), data(seed=step + 50)[1])
        for o in (a, b):
            o.zero_grad()
        la.backward()
        lb.backward()
        a.step()
        b.step()
        train_step(c, alone, *data(seed=step))
    assert_same(weights(first), weights(alone))


def test_a_model_inside_another_that_has_an_optimizer_of_its_own():
    """Generator and discriminator: the forward of one runs inside the other's training step."""
    generator, critic = mlp(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    a, b = KFAC(generator, lr=0.05), KFAC(critic, lr=0.05)
    x, y = data()
    for _ in range(5):
        b.zero_grad()
        F.cross_entropy(critic(generator(x).detach()), y).backward()
        b.step()
        a.zero_grad()
        with b.paused():
            fake = critic(generator(x))
        F.cross_entropy(fake, y).backward()
        a.step()
    assert all(p.isfinite().all() for m in (generator, critic) for p in m.parameters())


def test_parameters_moved_to_another_dtype_after_construction():
    model = mlp(torch.float32)
    optimizer = KFAC(model, lr=0.1)
    model.double()
    losses = [train_step(optimizer, model, *data(32)) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_assigning_requires_grad_later_is_picked_up_through_a_new_group():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = bare_kfac(model, lr=0.1)
    train_step(optimizer, model, *data())
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    before = weights(model)
    for _ in range(2):
        train_step(optimizer, model, *data())
    assert not torch.equal(before["0.weight"], model[0].weight)
