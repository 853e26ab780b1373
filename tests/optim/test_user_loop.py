"""The loop stays the user's: gradients, random numbers, accumulation, scalers, autocast, clipping, schedulers."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfac_opt import KFAC
from tests import reference
from tests.support import (
    Lambda,
    Sequence,
    assert_same,
    bare_kfac,
    close,
    data,
    estimate,
    gradients,
    mlp,
    pool,
    train_step,
    weights,
)

DOUBLE = torch.float64


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False, stem: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5) if stem else Lambda(lambda x: torch.cat([x, x[:, :1]], 1).requires_grad_())
        self.inner, self.head = nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.inner, torch.tanh(self.stem(x)), use_reentrant=self.reentrant))


def dropout_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        Lambda(lambda x: x.reshape(-1, 1, 2, 2)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Lambda(pool),
        nn.Linear(4, 3),
    )


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x[:, None, :].expand(-1, 3, -1)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, 2, batch_first=True, dropout=0.3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x[:, None, :].expand(-1, 3, -1))[0][:, -1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp with dropout": dropout_mlp,
    "convolution with batch norm": convolutional,
    "transformer": Encoder,
    "lstm": Recurrent,
    "checkpointed": Checkpointed,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    return NETWORKS[name]()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_bit_identical_with_and_without_kfac(network, fisher):
    results = []
    for attached in (False, True):
        model = make(network)
        optimizer = KFAC(model, fisher=fisher, lr=0.0, weight_decay=0.0) if attached else None
        torch.manual_seed(17)
        grads, losses = [], []
        for seed in range(3):
            x, y = data(seed=seed, dtype=torch.float32)
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.detach())
            grads.append(gradients(model))
            if optimizer is not None:
                optimizer.step()
        results.append((losses, grads, dict(model.named_buffers())))
    assert_same(*results)


def legacy_numpy_state() -> np.ndarray:
    """State of numpy's global generator, which augmentations still use."""
    return np.random.get_state()[1].copy()  # noqa: NPY002


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal", "identity"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_global_random_number_generators_are_neither_read_nor_advanced(fisher, curvature):
    model = mlp(torch.float32)
    x, y = data(dtype=torch.float32)
    before = torch.get_rng_state(), legacy_numpy_state(), random.getstate()
    optimizer = KFAC(model, fisher=fisher, curvature=curvature)
    for _ in range(3):
        train_step(optimizer, model, x, y)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == legacy_numpy_state()).all()
    assert before[2] == random.getstate()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = mlp(torch.float32)
        kfac = KFAC(net, fisher=fisher, curvature=curvature)
        torch.manual_seed(seed)
        for _ in range(3):
            train_step(kfac, net, x, y)
        results.append(weights(net))
    assert_same(*results)


def test_the_given_generator_decides_the_sampled_labels():
    x, y = data(dtype=torch.float32)
    results = []
    for seed in (1, 1, 2):
        model = mlp(torch.float32)
        optimizer = KFAC(model, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            train_step(optimizer, model, x, y)
        results.append(weights(model))
    assert_same(results[0], results[1])
    assert any(not torch.equal(results[0][n], results[2][n]) for n in results[0])


def test_sampled_labels_differ_between_steps_and_passes():
    """Resetting a seed at every step is a known mistake."""
    model, (x, _) = mlp(), data()
    optimizer = bare_kfac(model, fisher="mc", factor_decay=0.0)
    factors = []
    for _ in range(3):
        estimate(optimizer, model, x)
        factors.append(optimizer.curvature["2"].output_factor.clone())
    model(x)
    model(x)
    optimizer.step()
    factors.append(optimizer.curvature["2"].output_factor.clone())
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(factors) for b in factors[i + 1 :])


def test_sampled_labels_differ_between_the_passes_of_a_step():
    """Three equally likely classes, the same example in two passes: equal labels leave a factor of rank one."""
    model = nn.Linear(2, 3).to(DOUBLE)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = bare_kfac(model, fisher="mc", factor_decay=0.0, inverse_interval=10**6)
    equal, steps = 0, 60
    for _ in range(steps):
        for _ in range(2):
            model(torch.ones(1, 2, dtype=DOUBLE))
        optimizer.step()
        equal += int(torch.linalg.matrix_rank(optimizer.curvature[""].output_factor) == 1)
    # a binomial with probability 1/3: four standard errors
    assert abs(equal / steps - 1 / 3) <= 4 * (2 / 9 / steps) ** 0.5


# ---------------------------------------------------------------------------------------------
# accumulation


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_four_micro_batches_equal_one_batch(curvature, fisher):
    results = []
    for parts in (1, 4):
        model = mlp()
        optimizer = bare_kfac(model, lr=0.1, momentum=0.9, curvature=curvature, fisher=fisher, damping=0.1)
        for step in range(3):
            x, y = data(64, seed=step)
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts)):
                (F.cross_entropy(model(part_x), part_y) / parts).backward()
            optimizer.step()
        results.append((weights(model), {n: v.to_dense().clone() for n, v in optimizer.curvature.items()}))
    for one, four in zip(*results):
        for name in one:
            close(four[name], one[name], rtol=1e-9)


def test_micro_batches_of_unequal_size_count_by_their_size():
    model, (x, _) = mlp(), data(11)
    expected = reference.kronecker_factors(model, x, "0")[1]
    optimizer = bare_kfac(model)
    for part in (x[:7], x[7:10], x[10:]):
        model(part)
    optimizer.step()
    close(optimizer.curvature["0"].output_factor, expected)


def test_forward_of_all_passes_before_any_backward():
    model, (x, y) = mlp(), data()
    expected = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    losses = [F.cross_entropy(model(a), b) for a, b in zip(x.chunk(2), y.chunk(2))]
    sum(losses).backward()
    optimizer.step()
    close(optimizer.curvature["0"].to_dense(), torch.kron(*expected))


def test_zero_grad_does_not_drop_passes():
    model, (x, _) = mlp(), data()
    expected = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    model(x)
    optimizer.zero_grad()
    optimizer.step()
    close(optimizer.curvature["0"].to_dense(), torch.kron(*expected))


# ---------------------------------------------------------------------------------------------
# which passes count


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "paused"])
def test_passes_that_do_not_train_are_ignored(mode):
    model, (x, y) = mlp(), data()
    expected = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    if mode == "eval":
        model.eval()
        model(100 * x)
        model.train()
    else:
        context = {"no_grad": torch.no_grad(), "inference": torch.inference_mode()}.get(mode) or optimizer.paused()
        with context:
            model(100 * x)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    close(optimizer.curvature["0"].to_dense(), torch.kron(*expected))


def test_pausing_ends_with_the_block_also_after_an_exception():
    model, (x, _) = mlp(), data()
    expected = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    with pytest.raises(ZeroDivisionError), optimizer.paused():
        model(100 * x)
        raise ZeroDivisionError
    with optimizer.paused():
        with optimizer.paused():
            model(100 * x)
        model(100 * x)
    model(x)
    optimizer.step()
    close(optimizer.curvature["0"].to_dense(), torch.kron(*expected))


def test_a_forward_that_raises_leaves_no_pass_behind():
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.broken = nn.Linear(4, 4), nn.Linear(4, 3), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            if self.broken:
                raise RuntimeError("user error")
            return self.second(hidden)

    torch.manual_seed(0)
    model, (x, _) = Fragile().to(DOUBLE), data()
    expected = {n: reference.kronecker_factors(model, x, n) for n in ("first", "second")}
    optimizer = bare_kfac(model)
    model.broken = True
    with pytest.raises(RuntimeError, match="user error"):
        model(100 * x)
    model.broken = False
    model(x)
    optimizer.step()
    for name, (a, g) in expected.items():
        close(optimizer.curvature[name].to_dense(), torch.kron(a, g))


def test_the_model_may_return_an_object_with_logits_or_what_outputs_picks():
    class Wrapped(nn.Module):
        def __init__(self, wrap: Callable[[torch.Tensor], object]) -> None:
            super().__init__()
            self.net, self.wrap = mlp(), wrap

        def forward(self, x: torch.Tensor) -> object:
            return self.wrap(self.net(x))

    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    x, _ = data()
    expected = reference.kronecker_factors(mlp(), x, "0")
    for wrap, outputs in (
        (Output, None),
        (lambda f: (f, "extra"), lambda o: o[0]),
        (lambda f: {"out": f}, lambda o: o["out"]),
    ):
        model = Wrapped(wrap)
        optimizer = bare_kfac(model, outputs=outputs)
        estimate(optimizer, model, x)
        close(optimizer.curvature["net.0"].to_dense(), torch.kron(*expected))


def test_keyword_inputs_reach_the_model_and_the_layers():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, *, features: torch.Tensor) -> torch.Tensor:
            return self.outer(input=torch.tanh(self.inner(input=features)))

    torch.manual_seed(0)
    model, (x, _) = Keywords().to(DOUBLE), data()
    optimizer = bare_kfac(model)
    model(features=x)
    optimizer.step()
    a = torch.cat([x, torch.ones(8, 1, dtype=DOUBLE)], 1)
    close(optimizer.curvature["inner"].input_factor, a.T @ a / 8)


# ---------------------------------------------------------------------------------------------
# closures, clipping, schedulers


def test_closure_runs_once_with_gradients_enabled_and_its_loss_comes_back():
    ours, theirs = mlp(), mlp()
    x, y = data()
    a, b = KFAC(ours, lr=0.1), KFAC(theirs, lr=0.1)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        a.zero_grad()
        loss = F.cross_entropy(ours(x), y)
        loss.backward()
        return loss

    for step in range(3):
        loss = a.step(closure)
        expected = train_step(b, theirs, x, y)
        assert len(calls) == step + 1
        assert float(loss) == expected
    assert all(calls)
    assert_same(weights(ours), weights(theirs))


def test_step_without_closure_returns_none():
    model = mlp()
    optimizer = KFAC(model)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    assert optimizer.step() is None


def test_gradient_clipping_by_the_user_is_what_is_preconditioned():
    model, twin, (x, y) = mlp(), mlp(), data()
    a, b = bare_kfac(model), bare_kfac(twin)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    a.precondition_gradients_()
    b.precondition_gradients_()
    for p, q in zip(model.parameters(), twin.parameters()):
        # clip_grad_norm_ divides by the norm plus 1e-6
        close(p.grad, q.grad * (1e-3 / (norm + 1e-6)), rtol=1e-9)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
    ids=["step", "lambda", "cosine", "one cycle with momentum", "cyclic with momentum", "sequential"],
)
def test_schedulers_write_the_groups_as_for_sgd(scheduler, recwarn):
    ours, theirs = mlp(), mlp()
    kfac, sgd = KFAC(ours, lr=0.1, momentum=0.9), torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    schedulers = scheduler(kfac), scheduler(sgd)
    for _ in range(6):
        train_step(kfac, ours, *data())
        train_step(sgd, theirs, *data())
        for s in schedulers:
            s.step()
        assert kfac.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
        assert kfac.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"]
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_reduce_on_plateau():
    model = mlp()
    optimizer = KFAC(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        train_step(optimizer, model, *data())
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_a_tensor_learning_rate_is_understood():
    results = []
    for lr in (0.1, torch.tensor(0.1, dtype=DOUBLE)):
        model = mlp()
        optimizer = KFAC(model, lr=lr)
        for _ in range(3):
            train_step(optimizer, model, *data())
        results.append(weights(model))
    for n in results[0]:
        close(results[1][n], results[0][n])


# ---------------------------------------------------------------------------------------------
# checkpointing


def test_non_reentrant_checkpointing_gives_the_factors_of_the_plain_model():
    torch.manual_seed(0)
    model, (x, y) = Checkpointed().to(DOUBLE), data()
    plain = Checkpointed().to(DOUBLE)
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda z: plain.head(plain.inner(torch.tanh(plain.stem(z))))  # type: ignore[method-assign]
    expected = {n: reference.kronecker_factors(plain, x, n) for n in ("stem", "inner.0", "head")}
    optimizer = bare_kfac(model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, (a, g) in expected.items():
        close(optimizer.curvature[name].input_factor, a)
        close(optimizer.curvature[name].output_factor, g)


@pytest.mark.parametrize("stem", [True, False])
def test_reentrant_checkpointing_is_refused_with_the_layer_and_the_remedy(stem):
    """With a layer in front of the checkpoint and without: the estimate itself only fails in the first case."""
    torch.manual_seed(0)
    model, (x, y) = Checkpointed(reentrant=True, stem=stem).to(DOUBLE), data()
    optimizer = bare_kfac(model)
    with pytest.raises(RuntimeError, match=r"inner\.0(.|\n)*use_reentrant=False"):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


# ---------------------------------------------------------------------------------------------
# mixed precision


@pytest.mark.parametrize("network", ["mlp with dropout", "convolution with batch norm", "transformer", "lstm"])
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_autocast_in_bfloat16_trains_with_float32_state(network, curvature):
    model = make(network)
    optimizer = KFAC(model, lr=0.05, curvature=curvature)
    x, y = data(32, dtype=torch.float32)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    for view in optimizer.curvature.values():
        assert view.to_dense().dtype == torch.float32
        assert view.to_dense().isfinite().all()
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_step_inside_the_autocast_block_is_a_step_outside(curvature, fisher):
    runs = []
    for inside in (False, True):
        model, (x, y) = mlp(torch.float32), data(dtype=torch.float32)
        optimizer = KFAC(model, curvature=curvature, fisher=fisher)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                optimizer.step()
                view = optimizer.curvature["0"]
                seen = [view.to_dense(), view.precondition(torch.ones(5, 5))]
        runs.append([*weights(model).values(), *seen])
    assert_same(*runs)


def test_autocast_factors_agree_with_float32_to_bfloat16_rounding():
    x, _ = data(dtype=torch.float32)
    blocks = []
    for enabled in (False, True):
        model = mlp(torch.float32)
        optimizer = bare_kfac(model, factor_dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(x)
        optimizer.step()
        blocks.append(optimizer.curvature["0"].to_dense().clone())
    # A and G are products of numbers rounded to 8 bits (2^-8 each, four factors, two roundings in the layer)
    assert (blocks[0] - blocks[1]).norm() <= 8 * 2.0**-8 * blocks[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_train(dtype):
    model = mlp(dtype)
    optimizer = KFAC(model, lr=0.05)
    x, y = data(32, dtype=dtype)
    losses = [train_step(optimizer, model, x, y) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == dtype for p in model.parameters())
    assert optimizer.curvature["0"].input_factor.dtype == torch.float32


def test_grad_scaler_gives_the_run_without_it():
    """A power of two scales without rounding, and the sampled Fisher never sees it."""
    results = []
    for enabled in (False, True):
        model = mlp(torch.float32)
        optimizer = KFAC(model, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for step in range(4):
            x, y = data(seed=step, dtype=torch.float32)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    assert_same(*results)


def test_grad_scaler_and_the_empirical_fisher_undo_the_scale():
    results = []
    for enabled in (False, True):
        model = mlp()
        optimizer = bare_kfac(model, lr=0.1, fisher="empirical")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for step in range(3):
            x, y = data(seed=step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    for n in results[0]:
        close(results[1][n], results[0][n], rtol=1e-8)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_a_step_that_the_scaler_skips_finds_and_leaves_the_optimizer_as_it_was(fisher, curvature):
    import copy

    model = mlp(torch.float32)
    optimizer = KFAC(model, lr=0.1, fisher=fisher, curvature=curvature)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)

    def loop(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()

    x, y = data(dtype=torch.float32)
    loop(x, y)
    state, before = copy.deepcopy(optimizer.state_dict()), weights(model)
    bad = x.clone()
    bad[0, 0] = float("inf")
    loop(bad, y)
    assert scaler.get_scale() == 2.0**3
    assert_same(optimizer.state_dict(), state)
    assert_same(weights(model), before)
    loop(x, y)
    assert optimizer.dropped_estimates == 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(v.to_dense().isfinite().all() for v in optimizer.curvature.values())


def test_passes_of_a_skipped_step_stay_pending():
    """A scaler that skips because the scaled loss overflowed: the batch itself was fine and counts in the next step."""
    model, x = mlp(), data(8)[0]
    expected = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    model(x[:5])  # step() skipped here
    model(x[5:])
    optimizer.step()
    close(optimizer.curvature["0"].to_dense(), torch.kron(*expected))


def test_sequences_with_padding_train_with_masked_loss_and_masked_fisher():
    torch.manual_seed(0)
    model = Sequence(per_token=True)
    x, y = torch.randn(8, 5, 3), torch.randint(3, (8, 5))
    mask = torch.arange(5)[None, :] < torch.randint(1, 6, (8, 1))
    optimizer = KFAC(model, lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with optimizer.masked(mask):
            logits = model(x)
        loss = F.cross_entropy(logits[mask], y[mask])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------------------------------------
# less ordinary loops


def test_gradient_penalties_with_a_second_derivative():
    results = []
    for attached in (False, True):
        model = mlp(torch.float32)
        optimizer = KFAC(model, lr=0.0) if attached else None
        x, y = data(dtype=torch.float32)
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()
        results.append(gradients(model))
        if optimizer is not None:
            optimizer.step()
            assert optimizer.dropped_estimates == 0
    assert_same(*results)


def test_saved_tensors_on_the_cpu():
    results = []
    for offload in (False, True):
        model, (x, y) = mlp(), data()
        optimizer = bare_kfac(model)
        with torch.autograd.graph.save_on_cpu() if offload else torch.enable_grad():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        results.append((gradients(model), optimizer.curvature["0"].to_dense()))
    assert_same(*results)


def test_a_part_of_the_model_under_no_grad_is_no_reentrant_checkpoint():
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                features = torch.tanh(self.backbone(x))
            return self.head(features)

    torch.manual_seed(0)
    model, (x, y) = Features().to(DOUBLE), data()
    a, g = reference.kronecker_factors(model, x, "head")
    optimizer = bare_kfac(model, lr=0.1)
    before = model.backbone.weight.clone()
    for _ in range(2):
        train_step(optimizer, model, x, y)
    assert torch.equal(before, model.backbone.weight)
    assert optimizer.curvature["head"].to_dense().shape == torch.kron(a, g).shape


def test_a_model_with_two_inputs():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.left(a)) * torch.tanh(self.right(b)))

    torch.manual_seed(0)
    model, inputs = Pair().to(DOUBLE), (torch.randn(6, 4, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE))
    expected = {n: reference.kronecker_factors(model, inputs, n) for n in ("left", "right", "head")}
    optimizer = bare_kfac(model)
    estimate(optimizer, model, *inputs)
    for name, (a, g) in expected.items():
        close(optimizer.curvature[name].to_dense(), torch.kron(a, g))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_one_output_per_example_may_come_without_its_dimension(likelihood):
    x, _ = data()
    blocks = []
    for squeeze in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(DOUBLE)
        if squeeze:
            model.append(nn.Flatten(0))
        optimizer = bare_kfac(model, likelihood=likelihood)
        estimate(optimizer, model, x)
        blocks.append(optimizer.curvature["0"].to_dense())
    close(blocks[1], blocks[0])


def test_parameters_of_several_dtypes_in_one_group():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Lambda(lambda h: h.bfloat16()), nn.Linear(8, 3, dtype=torch.bfloat16))
    optimizer = KFAC(model, lr=0.1)
    x, y = data(32, dtype=torch.float32)
    losses = [train_step(optimizer, model, x, y) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert [p.dtype for p in model.parameters()] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_regression_and_binary_labels_train(likelihood, curvature):
    model = mlp(torch.float32, classes=2)
    x, _ = data(64, dtype=torch.float32)
    target = torch.stack([(x[:, 0] > 0).float(), (x[:, 1] > x[:, 2]).float()], dim=1)
    loss = F.mse_loss if likelihood == "gaussian" else F.binary_cross_entropy_with_logits
    optimizer = KFAC(model, likelihood=likelihood, curvature=curvature)
    losses = [train_step(optimizer, model, x, target, loss) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_hooks_on_parameters_see_the_users_gradients_alone(fisher):
    """Parameters without an adapter are differentiated once more for their curvature, which is none of the hooks' business."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * self.layer(x)

    diagonals = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model, seen = Gain(), []
        if hooked:
            handle = model.gain.register_hook(lambda g, seen=seen: seen.append(g.clone()))
        optimizer = KFAC(model, fisher=fisher, factor_interval=1)
        x, y = data(dtype=torch.float32)
        F.cross_entropy(model(x), y).backward()
        if hooked:
            assert len(seen) == 1
            assert torch.equal(seen[0], model.gain.grad)
        optimizer.step()
        diagonals.append(optimizer.curvature["gain"].diagonal)
        if hooked:
            handle.remove()
            F.cross_entropy(model(x), y).backward()
            assert len(seen) == 1
    assert torch.equal(*diagonals)
