"""What ``KFACVI`` promises about its passes, its step and its state."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC, KFACVI, Posterior
from kfac_opt._step.seeds import WEIGHTS
from kfac_opt.bayes.posterior import NoiseSource
from kfac_opt.bayes.prediction import predict
from tests.support import assert_same, close, data, gradients, mlp, weights


def vi(model: nn.Module, params: Any = None, **options: Any) -> KFACVI:
    """Curvature at every step, float64, narrow prior."""
    plain: dict[str, Any] = {
        "lr": 0.05,
        "num_data": 100,
        "prior_precision": 20.0,
        "posterior_floor": 0.0,
        "factor_interval": 1,
        "inverse_interval": 1,
        "factor_dtype": torch.float64,
    }
    return KFACVI(model, params, **{**plain, **options})


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(optimizer: KFACVI, model: nn.Module, steps: int = 1, samples: int = 1, seed: int = 5) -> None:
    for step in range(steps):
        x, y = data(seed=seed + step)
        optimizer.zero_grad()
        for _ in optimizer.weight_samples(samples):
            backward(model, x, y)
        optimizer.step()


# -- the weights ------------------------------------------------------------------------------------------------


def test_passes_run_at_different_draws_and_the_means_come_back_bit_for_bit():
    model = mlp()
    optimizer = vi(model, antithetic=False)
    train(optimizer, model)
    before, seen = weights(model), []
    for index in optimizer.weight_samples(3):
        assert index == len(seen)
        seen.append(weights(model))
    assert_same(weights(model), before)
    for name in before:
        assert not torch.equal(seen[0][name], before[name])
        assert not torch.equal(seen[0][name], seen[1][name])
        assert not torch.equal(seen[1][name], seen[2][name])


def test_antithetic_draws_come_in_pairs_and_an_odd_one_stands_alone():
    model = mlp()
    optimizer = vi(model, antithetic=True)
    train(optimizer, model)
    mean = weights(model)
    first = [weights(model) for _ in optimizer.weight_samples(3)]
    for name, value in mean.items():
        close(first[0][name] + first[1][name], 2 * value)
        assert not torch.equal(first[2][name], value)
    # The next loop of the same step starts a new pair.
    second = [weights(model) for _ in optimizer.weight_samples(1)]
    assert float((second[0]["0.weight"] + first[2]["0.weight"] - 2 * mean["0.weight"]).abs().max()) > 1e-3


def test_before_the_first_estimate_all_passes_run_at_the_mean():
    model = mlp()
    optimizer = vi(model)
    before = weights(model)
    for _ in optimizer.weight_samples(3):
        assert_same(weights(model), before)
        backward(model, *data())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["exception", "break", "close", "end"])
def test_leaving_the_loop_in_any_way_restores_weights_bit_for_bit(dtype: torch.dtype, way: str):
    model = mlp(dtype)
    optimizer = vi(model, factor_dtype=torch.float32)
    x, y = data(dtype=dtype)
    backward(model, x, y)
    optimizer.step()
    before, storages = weights(model), [p.data_ptr() for p in model.parameters()]
    if way == "exception":
        with pytest.raises(KeyError):
            for _ in optimizer.weight_samples(3):
                raise KeyError
    elif way == "break":
        for _ in optimizer.weight_samples(3):
            break
    elif way == "close":
        samples = optimizer.weight_samples(3)
        next(samples)
        assert not torch.equal(model[0].weight, before["0.weight"])
        samples.close()
    else:
        for _ in optimizer.weight_samples(3):
            pass
    assert_same(weights(model), before)
    assert [p.data_ptr() for p in model.parameters()] == storages
    with optimizer.sampled_params():  # nothing is left behind that would forbid the next context
        pass


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_sampled_params_restores_weights_bit_for_bit(error: type[BaseException]):
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model)
    before = weights(model)
    with pytest.raises(error), optimizer.sampled_params():
        assert not torch.equal(model[0].weight, before["0.weight"])
        raise error
    assert_same(weights(model), before)


def test_sampled_params_draws_anew_each_time_and_does_not_disturb_training():
    runs = []
    for evaluate in (False, True):
        model = mlp()
        optimizer = vi(model)
        train(optimizer, model, 2)
        if evaluate:
            draws = []
            for _ in range(2):
                with optimizer.sampled_params():
                    draws.append(weights(model))
            assert not torch.equal(draws[0]["0.weight"], draws[1]["0.weight"])
            with optimizer.sampled_params(torch.Generator().manual_seed(3)):
                given = weights(model)
            with optimizer.sampled_params(torch.Generator().manual_seed(3)):
                assert_same(weights(model), given)
        train(optimizer, model, 2, samples=2)
        runs.append(weights(model))
    assert_same(runs[0], runs[1])


def test_contexts_refuse_each_other_and_the_step():
    model = mlp()
    optimizer = vi(model)
    with pytest.raises(RuntimeError, match="no curvature to draw from before the first step"):  # noqa: SIM117
        with optimizer.sampled_params():
            pass
    train(optimizer, model)
    for _ in optimizer.weight_samples(1):
        for action in (
            optimizer.step,
            optimizer.precondition_gradients_,
            optimizer.posterior,
            lambda: next(optimizer.weight_samples(1)),
            lambda: optimizer.sampled_params().__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"inside weight_samples\(\)"):
                action()
    with optimizer.sampled_params():
        for action in (optimizer.step, lambda: next(optimizer.weight_samples(1)), optimizer.posterior):
            with pytest.raises(RuntimeError, match=r"inside sampled_params\(\)"):
                action()


def test_the_global_random_state_is_left_alone():
    model = mlp()
    optimizer = vi(model)
    before = torch.get_rng_state()
    train(optimizer, model, 3, samples=2)
    with optimizer.sampled_params():
        pass
    optimizer.posterior().sample()
    assert torch.equal(torch.get_rng_state(), before)


# -- gradients and statistics -----------------------------------------------------------------------------------


def test_gradients_after_the_loop_are_what_was_there_plus_the_mean_over_passes():
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model)
    optimizer.zero_grad()
    x, y = data()
    backward(model, x, y)
    before, passes = gradients(model), []
    for _ in optimizer.weight_samples(3):
        assert all(parameter.grad is None for parameter in model.parameters())
        backward(model, x, y)
        passes.append(gradients(model))
    for name, value in gradients(model).items():
        close(value, before[name] + sum(part[name] for part in passes) / 3)


def test_a_pass_that_is_left_counts_for_nothing():
    model = mlp()
    optimizer = vi(model, fisher="exact", factor_decay=0.0)
    train(optimizer, model)
    optimizer.zero_grad()
    x, y = data()
    draws = []
    for index in optimizer.weight_samples(4):
        draws.append(weights(model))
        loss = backward(model, x, y)
        if index == 2:
            break
        del loss
    kept = [at(model, draw, x, y) for draw in draws[:2]]
    for name, value in gradients(model).items():
        close(value, (kept[0][0][name] + kept[1][0][name]) / 2)
    mean = weights(model)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert_same(weights(model), mean)
    close(optimizer.curvature["2"].input_factor, (kept[0][1] + kept[1][1]) / 2)


def at(model: nn.Module, draw: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and the input factor of layer "2" of a detached copy of the model at these weights."""
    twin = mlp()
    twin.load_state_dict(draw)
    backward(twin, x, y)
    hidden = twin[1](twin[0](x)).detach()
    rows = torch.cat([hidden, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return gradients(twin), rows.T @ rows / len(x)


def test_factors_are_means_over_the_passes():
    model = mlp()
    optimizer = vi(model, factor_decay=0.0, lr=0.0)
    train(optimizer, model)
    x, y = data(seed=9)
    optimizer.zero_grad()
    draws = []
    for _ in optimizer.weight_samples(3):
        draws.append(weights(model))
        backward(model, x, y)
    optimizer.step()
    close(optimizer.curvature["2"].input_factor, sum(at(model, draw, x, y)[1] for draw in draws) / 3)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_several_samples_at_the_mean_equal_one(fisher: str):
    results = []
    for samples in (1, 4):
        model = mlp()
        # All passes of the first step run at the mean: factors and gradients must not depend on their number.
        optimizer = vi(model, fisher=fisher)
        train(optimizer, model, samples=samples)
        results.append((weights(model), optimizer.curvature["0"].output_factor))
    for name in results[0][0]:
        close(results[0][0][name], results[1][0][name])
    close(results[0][1], results[1][1])


def test_a_pass_with_a_non_finite_gradient_is_dropped_and_counted():
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model)
    optimizer.zero_grad()
    x, y = data()
    passes = []
    for index in optimizer.weight_samples(3):
        backward(model, x, y)
        passes.append(gradients(model))
        if index == 1:
            model[2].bias.grad[0] = float("nan")
    assert optimizer.dropped_samples == 1
    for name, value in gradients(model).items():
        close(value, (passes[0][name] + passes[2][name]) / 2)


def test_if_all_passes_are_dropped_their_sum_is_left_for_the_scaler():
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model)
    optimizer.zero_grad()
    for _ in optimizer.weight_samples(2):
        (model(data()[0]).sum() * float("inf")).backward()
    assert optimizer.dropped_samples == 2
    assert not torch.isfinite(model[0].weight.grad).all()


def test_a_scaler_that_skips_the_step_finds_the_optimizer_as_it_was():
    model = mlp(torch.float32)
    optimizer = vi(model, factor_dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = data(dtype=torch.float32)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        for _ in optimizer.weight_samples(2):
            scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    step(float("inf"))
    assert_same(weights(model), before)
    assert_same(optimizer.state_dict(), state)
    step(1.0)
    assert not torch.equal(model[0].weight, before["0.weight"])


# -- the step ---------------------------------------------------------------------------------------------------


def test_closure_gives_the_same_step_as_the_loop_and_the_mean_loss():
    results = []
    for use_closure in (True, False):
        model = mlp()
        optimizer = vi(model, num_samples=3)
        train(optimizer, model)
        x, y = data(seed=3)
        losses: list[Tensor] = []

        def closure(model=model, optimizer=optimizer, x=x, y=y, losses=losses) -> Tensor:
            optimizer.zero_grad()
            losses.append(backward(model, x, y).detach())
            return losses[-1]

        if use_closure:
            model[0].weight.grad = torch.ones_like(model[0].weight)  # discarded
            returned = optimizer.step(closure)
            assert len(losses) == 3
            close(returned, torch.stack(losses).mean())
        else:
            optimizer.zero_grad()
            for _ in optimizer.weight_samples():
                backward(model, x, y)
            optimizer.step()
        results.append(weights(model))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("how", ["gradients", "closure", "loss"])
def test_a_step_without_a_finite_pass_leaves_the_weights_alone(how: str):
    model = mlp()
    optimizer = vi(model, num_samples=2)
    train(optimizer, model, 2, samples=2)
    before, (x, y) = weights(model), data()
    optimizer.zero_grad(set_to_none=False)

    def closure() -> Tensor:
        loss = backward(model, x if how == "loss" else x * math.nan, y)
        return loss * math.inf if how == "loss" else loss

    if how == "gradients":
        for _ in optimizer.weight_samples():
            closure()
        optimizer.step()
    else:
        assert not math.isfinite(optimizer.step(closure))
    assert optimizer.dropped_samples == 2
    assert_same(weights(model), before)
    train(optimizer, model, 2, samples=2)  # and the next one goes on
    assert all(torch.isfinite(value).all() and not torch.equal(value, before[name]) for name, value in weights(model).items())
    backward(model, x, y)  # a plain step after passes that were given up
    optimizer.step()
    assert not torch.equal(weights(model)["0.weight"], before["0.weight"])


def test_closure_drops_non_finite_losses_and_returns_the_mean_of_the_others():
    model = mlp()
    optimizer = vi(model, num_samples=4)
    train(optimizer, model)
    values = iter([1.0, math.inf, 3.0, math.nan])

    def closure() -> Tensor:
        loss = F.cross_entropy(model(data()[0]), data()[1])
        loss.backward()
        return loss.detach() * 0 + next(values)

    assert float(optimizer.step(closure)) == 2.0
    assert optimizer.dropped_samples == 2


def test_a_closure_that_returns_nothing_is_explained_and_the_weights_come_back():
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model)
    before = weights(model)
    with pytest.raises(TypeError, match=r"KFACVI.step: the closure returned None, expected the loss. .*return loss"):
        optimizer.step(lambda: None)
    assert_same(weights(model), before)


def test_plain_loop_without_samples_is_kfac_with_the_prior():
    vi_model, kfac_model = mlp(), mlp()
    shared = {"lr": 0.05, "factor_interval": 1, "inverse_interval": 1, "fisher": "exact", "factor_dtype": torch.float64}
    shared |= {"damping_scale": "absolute", "damping_style": "exact"}
    delta = 20.0 / 100
    variational = KFACVI(vi_model, num_data=100, prior_precision=20.0, damping=0.3, **shared)
    coupled = {"weight_decay": delta, "decoupled_weight_decay": False}
    plain = KFAC(kfac_model, damping=0.3 + delta, update_scale="natural", **coupled, **shared)
    for step in range(4):
        x, y = data(seed=step)
        for model, optimizer in ((vi_model, variational), (kfac_model, plain)):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
    for name, value in weights(vi_model).items():
        close(value, weights(kfac_model)[name], rtol=1e-9)


def test_default_decay_follows_the_learning_rate():
    model = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = vi(model, lr=0.5, weight_decay=0.1, momentum=0.0, kl_clip=1e-30, prior_precision=1e-9)
    before = weights(model)
    x, y = data()
    backward(model, x, y)
    optimizer.step()
    close(model.weight.detach(), (1 - 0.5 * 0.1) * before["weight"], rtol=1e-9)


def test_draws_use_the_last_refresh_and_the_posterior_the_current_factors():
    model = mlp()
    optimizer = vi(model, inverse_interval=100, refresh="together", ramp_steps=0, lr=0.0, factor_decay=0.5)
    train(optimizer, model, 1)
    values = optimizer.blocks["0"].block
    old = values.spectral_form(optimizer.state[model[0].weight]["curvature"], current=False).dense().clone()
    train(optimizer, model, 2, seed=50)
    new = optimizer.curvature["0"].to_dense()
    assert float((old[0] - new).abs().max()) > 1e-3
    width = optimizer._sampler.posterior.width(optimizer.blocks["0"])
    eye = torch.eye(len(new), dtype=torch.float64)
    expected = torch.linalg.inv(width.ess * (new + width.delta * eye)).diagonal()
    matrix = expected.reshape(5, 5).T  # column-stacking vec of [out, in]
    close(optimizer.posterior().variance()["0.weight"], matrix[:, :4].contiguous())
    close(optimizer._sampler.posterior.covariances(current=False)[0].form.dense(), old)


# -- batch norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["step", "pass"])
def test_running_statistics_move_once_per_step_or_once_per_pass(rule: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = vi(model, batch_statistics=rule)
    x, y = data()
    optimizer.zero_grad()
    after = []
    for _ in optimizer.weight_samples(3):  # all at the mean: the first estimate is not there yet
        backward(model, x, y)
        after.append(model[1].running_mean.clone())
    batch_mean = model[0](x).mean(0).detach()
    moves = 1 if rule == "step" else 3
    close(model[1].running_mean, (1 - 0.9**moves) * batch_mean)
    assert int(model[1].num_batches_tracked) == moves


# -- the posterior ----------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """One of each kind of block."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.conv(self.table(tokens).mT).mT
        return self.out((self.norm(hidden) * self.scale).mean(1))


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("damping", ["exact", "factored"])
def test_every_kind_of_block_has_a_posterior(curvature: str, damping: str):
    torch.manual_seed(0)
    model = Everything().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bare parameter is announced
        optimizer = vi(model, curvature=curvature, posterior_damping=damping)
    tokens, y = torch.randint(7, (8, 5)), torch.randint(3, (8,))
    for _ in range(3):
        optimizer.zero_grad()
        for _ in optimizer.weight_samples(2):
            F.cross_entropy(model(tokens), y).backward()
        optimizer.step()
    posterior = optimizer.posterior()
    assert list(posterior.mean) == [name for name, _ in model.named_parameters()]
    for name, variance in posterior.variance().items():
        assert bool((variance > 0).all())
        assert bool((variance <= 1 / 20.0 + 1e-12).all()), name  # never wider than the prior
    assert torch.isfinite(posterior.kl())
    prediction = predict(model.eval(), posterior, tokens, 5)
    close(prediction.probabilities.sum(-1), torch.ones(8, dtype=torch.float64))
    sample = posterior.sample()
    assert torch.isfinite(posterior.log_prob(sample))


def test_posterior_is_independent_of_further_training_and_of_the_optimizer(tmp_path: Any):
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model, 3)
    posterior = optimizer.posterior()
    posterior.save(tmp_path / "p.pt")
    first = posterior.sample(torch.Generator().manual_seed(0))
    train(optimizer, model, 3)
    assert_same(posterior.sample(torch.Generator().manual_seed(0)), first)
    loaded = Posterior.load(tmp_path / "p.pt")
    assert_same(loaded.sample(torch.Generator().manual_seed(0)), first)
    assert loaded.num_data == 100


def test_posterior_covers_what_the_optimizer_trains():
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = vi(model, [model[0].weight])
    backward(model, *data())
    optimizer.step()
    posterior = optimizer.posterior()
    assert list(posterior.mean) == ["0.weight"]
    assert posterior.fixed == ("0.bias", "2.weight", "2.bias")


def test_groups_have_priors_of_their_own():
    model = mlp()
    groups = [{"params": model[0].parameters(), "prior_precision": 500.0}, {"params": model[2].parameters()}]
    optimizer = vi(model, groups)
    train(optimizer, model)
    widths = {block.weight: block.width.prior_precision for block in optimizer.posterior().blocks}
    assert widths == {"0.weight": 500.0, "2.weight": 20.0}
    assert float(optimizer.posterior().variance()["0.weight"].max()) <= 1 / 500.0


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("frozen", [("0.weight", "0.bias"), ("0.weight",), ("0.bias",)])
def test_what_is_frozen_during_the_training_is_no_longer_random(frozen: tuple[str, ...], curvature: str):
    model, (x, y) = mlp(), data(seed=1)
    optimizer = vi(model, curvature=curvature)
    train(optimizer, model, 3)
    named = dict(model.named_parameters())
    for name in frozen:
        named[name].requires_grad_(False)
    before = weights(model)
    train(optimizer, model, 1)
    draws = []
    for _ in optimizer.weight_samples(2):
        draws.append(weights(model))
        backward(model, x, y)
    posterior = optimizer.posterior()
    assert list(posterior.mean) == [name for name in named if name not in frozen]
    assert torch.isfinite(predict(model, posterior, x, 3).probabilities).all()
    for name in named:
        moved = not torch.equal(draws[0][name], draws[1][name])
        assert moved == (name not in frozen), name
        assert torch.equal(weights(model)[name], before[name]) == (name in frozen), name
    if len(frozen) == 1:  # the precision of what is left, given what is fixed: the diagonal of its Fisher block
        diagonal = optimizer.curvature["0"].to_dense().diagonal().unflatten(0, (-1, len(named["0.bias"]))).T
        left = diagonal[:, -1] if frozen == ("0.weight",) else diagonal[:, :-1]
        name = "0.bias" if frozen == ("0.weight",) else "0.weight"
        close(posterior.variance()[name], 1 / (100 * (left + 20.0 / 100)))
    for name in frozen:
        named[name].requires_grad_(True)
    train(optimizer, model, 1)
    assert list(optimizer.posterior().mean) == list(named)
    assert len(optimizer.posterior().blocks) == 2


def test_the_default_floor_keeps_the_noise_below_the_signal():
    model = Everything().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = KFACVI(model, num_data=20, factor_dtype=torch.float64, factor_interval=1)
    tokens, y = torch.randint(7, (8, 5)), torch.randint(3, (8,))
    F.cross_entropy(model(tokens), y).backward()
    optimizer.step()
    blocks = {block.weight: block for block in optimizer.posterior().blocks}
    limits = {"table.weight": 0.5 / 7**0.5, "conv.weight": 0.5 / 7**0.5, "out.weight": 0.5 / 6**0.5}
    limits |= {"norm.weight": 0.05, "scale": 0.05}
    for name, limit in limits.items():
        assert float(blocks[name].deviation.max()) <= limit * (1 + 1e-9), name
        assert blocks[name].width.floor > 0
    # Where data or prior bound the noise already, nothing is added.
    optimizer.param_groups[0]["prior_precision"] = 1e4
    assert all(block.width.floor == 0.0 for block in optimizer.posterior().blocks)


class Attention(nn.Module):
    """Projections without a matrix block, 256 inputs wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(256, 2, batch_first=True, add_zero_attn=True), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x)[0][:, 0])
        return out


@pytest.mark.filterwarnings("ignore:.*diagonal curvature")
@pytest.mark.parametrize("kind", ["attention", "diagonal"])
def test_the_default_floor_counts_the_inputs_of_weights_without_a_matrix_block(kind: str):
    """A deviation of 0.05 would be noise of 0.8 at an output with 256 inputs of unit size."""
    model = Attention() if kind == "attention" else nn.Sequential(nn.Linear(256, 1), nn.Linear(1, 3))
    optimizer = KFACVI(model, num_data=20, curvature="kronecker" if kind == "attention" else "diagonal")
    F.cross_entropy(model(torch.randn(8, 4, 256) if kind == "attention" else torch.randn(8, 256)), torch.arange(8) % 3).backward()
    optimizer.step()
    name = "attention.in_proj_weight" if kind == "attention" else "0.weight"
    (block,) = [block for block in optimizer.posterior().blocks if block.weight == name]
    assert 0.4 < float(block.deviation.max()) * 256**0.5 <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_diagonal_blocks_of_factors_are_those_of_the_covariance(curvature: str):
    model, whole = mlp(), mlp()
    optimizer = vi(model, curvature=curvature, max_block_dim=3)
    train(optimizer, model, 2, samples=2)
    train(vi(whole, curvature=curvature), whole, 2, samples=2)
    assert not torch.equal(weights(model)["0.weight"], weights(whole)["0.weight"])
    posterior = optimizer.posterior()
    for block in posterior.blocks:
        fisher = optimizer.curvature[block.weight.removesuffix(".weight")].to_dense()
        dense = torch.linalg.inv(100 * (fisher + 0.2 * torch.eye(len(fisher), dtype=torch.float64)))
        close(block.marginal_variance()[0], dense.diagonal().unflatten(0, (-1, block.layout.shape[1])).T)
        close(block.spectrum.log().sum(), dense.logdet())


def test_inverses_in_bfloat16_leave_the_draws_as_they_are():
    drawn = []
    for dtype in (None, torch.bfloat16):
        model = mlp()
        optimizer = vi(model, lr=0.0, inverse_dtype=dtype)
        train(optimizer, model)
        drawn.append([weights(model) for _ in optimizer.weight_samples(2)])
        assert optimizer.state[model[0].weight]["curvature"]["input_inverse"].dtype == (dtype or torch.float64)
    assert_same(drawn[0], drawn[1])


def test_posterior_before_the_first_estimate_is_explained():
    with pytest.raises(RuntimeError, match="there is no curvature yet"):
        vi(mlp()).posterior()
    with pytest.raises(RuntimeError, match=r"KFAC.posterior: there is no curvature yet"):
        KFAC(mlp()).posterior(num_data=10)


# -- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_resuming_is_bit_for_bit_including_the_noise(curvature: str, tmp_path: Any):
    options: dict[str, Any] = {"curvature": curvature, "factor_interval": 2, "inverse_interval": 4, "ramp_steps": 1}
    options |= {"generator": torch.Generator().manual_seed(8), "prior_gradient": "sample", "num_samples": 3}
    model = mlp()
    optimizer = vi(model, **options)
    train(optimizer, model, 5, samples=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    train(optimizer, model, 4, samples=3, seed=90)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    other = mlp()
    other.load_state_dict(saved["model"])
    resumed = vi(other, **{**options, "generator": None})
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, other, 4, samples=3, seed=90)
    assert_same(weights(other), weights(model))
    assert_same(resumed.state_dict(), optimizer.state_dict())
    assert_same(resumed.posterior().sample(), optimizer.posterior().sample())


@pytest.mark.parametrize("decay", [0.95, 0.0])  # without memory the weight of the average is 1 from the first estimate on
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_the_kept_covariances_of_the_draws_are_those_of_the_curvature_and_the_widths_at_every_step(curvature: str, decay: float):
    model = mlp()
    optimizer = vi(model, curvature=curvature, factor_interval=4, inverse_interval=6, ramp_steps=1, factor_decay=decay)
    other_model = mlp()
    other = vi(other_model, curvature=curvature, generator=torch.Generator().manual_seed(7))
    train(other, other_model, 14, seed=70)
    reused = 0
    for step in range(14):
        before = optimizer._sampler.posterior._covariances
        if step == 6:
            optimizer.param_groups[0]["temperature"] = 0.5
        if step == 12:
            saved = copy.deepcopy(other.state_dict())
            for group in saved["param_groups"]:
                group["temperature"] = 0.5
            optimizer.load_state_dict(saved)
        source, fresh = optimizer._sampler.posterior.source(), optimizer._sampler.posterior.covariances(current=False)
        reused += bool(fresh) and before is not None and source is before.source
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        assert_same(source.draw(seeds[0]), NoiseSource(fresh).draw(seeds[1]))
        train(optimizer, model, 1, seed=step)
    assert reused >= 2, "nothing was kept"


def test_draws_are_those_of_their_step():
    """Across refreshes, another temperature, other numbers of passes, two loops in a step."""
    settings: dict[str, Any] = {"factor_interval": 4, "inverse_interval": 12, "ramp_steps": 1, "antithetic": False}
    model = mlp()
    optimizer = vi(model, **settings)
    for step in range(34):
        if step == 20:
            optimizer.param_groups[0]["temperature"] = 0.5
        means, pairs = weights(model), 0
        for samples in [3] if step == 30 else [1, 2] if step == 31 else [1]:
            first = pairs + pairs % 2
            for index in optimizer.weight_samples(samples):
                source = NoiseSource(optimizer._sampler.posterior.covariances(current=False))
                noise = source.draw(optimizer._sampler._generator(WEIGHTS, first + index))
                expected = {name: mean + noise[name] if name in noise else mean for name, mean in means.items()}
                assert_same(weights(model), expected)
                backward(model, *data(seed=step))
            pairs = first + samples
        optimizer.step()
        optimizer.zero_grad()


def test_loading_forgets_the_draws_of_passes_without_a_step():
    model, fresh_model = mlp(), mlp()
    optimizer = vi(model, prior_gradient="sample")
    train(optimizer, model, 2)
    saved, means = copy.deepcopy(optimizer.state_dict()), weights(model)
    for _ in optimizer.weight_samples(3):
        backward(model, *data(seed=9))
    with optimizer.sampled_params():
        pass
    optimizer.load_state_dict(saved)
    fresh = vi(fresh_model, prior_gradient="sample")
    fresh_model.load_state_dict(means)
    fresh.load_state_dict(saved)
    with optimizer.sampled_params():
        evaluated = weights(model)
    with fresh.sampled_params():
        assert_same(weights(fresh_model), evaluated)
    train(optimizer, model, 2, seed=11)
    train(fresh, fresh_model, 2, seed=11)
    assert_same(weights(model), weights(fresh_model))


def test_draws_are_as_exact_inside_autocast():
    models = mlp(torch.float32), mlp(torch.float32)
    found = []
    for model, enabled in zip(models, (False, True)):
        optimizer = vi(model, factor_dtype=torch.float32)
        x, y = data(seed=3)
        backward(model, x.float(), y)
        optimizer.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            drawn = [weights(model) for _ in optimizer.weight_samples(2)]
            with optimizer.sampled_params():
                drawn.append(weights(model))
            drawn.append(optimizer.posterior().sample())
        found.append(drawn)
    assert_same(found[1], found[0])


def test_a_copied_pair_goes_on_alike_and_pickles_without_its_model():
    model = mlp()
    optimizer = vi(model, num_samples=2, prior_gradient="sample")
    train(optimizer, model, 2, samples=2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(optimizer, model, 2, samples=2)
    train(twin, twin_model, 2, samples=2)
    assert_same(weights(twin_model), weights(model))
    lonely = pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(RuntimeError, match="not attached to a model"):
        next(lonely.weight_samples(1))
    with pytest.raises(RuntimeError, match="not attached to a model"):
        lonely.posterior()


def test_a_temperature_warm_up_by_writing_the_group():
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model)
    spread = []
    for temperature in (1e-6, 1.0):
        optimizer.param_groups[0]["temperature"] = temperature
        mean = model[0].weight.detach().clone()
        for _ in optimizer.weight_samples(1):
            spread.append(float((model[0].weight.detach() - mean).norm()))
    assert spread[0] < 0.3 * spread[1]  # where the data determine nothing the prior's variance stays
    optimizer.param_groups[0]["temperature"] = 0.0
    with pytest.raises(ValueError, match="temperature must be > 0"):
        next(optimizer.weight_samples(1))
    optimizer.param_groups[0].update(temperature=1.0, num_data="many")
    for sampling in (lambda: next(optimizer.weight_samples(1)), lambda: optimizer.sampled_params().__enter__()):
        with pytest.raises((TypeError, ValueError), match=r"KFACVI: num_data must be .* got 'many'"):
            sampling()


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data must be > 0"),
        ({"num_data": float("inf")}, "num_data must be > 0 and finite"),
        ({"prior_precision": 0.0}, "prior_precision must be > 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": -1.0}, "temperature must be > 0"),
        ({"posterior_floor": -0.1}, "posterior_floor must be >= 0"),
        ({"damping": -0.1}, "damping must be >= 0"),
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"posterior_damping": "pi"}, "posterior_damping must be one of"),
        ({"prior_gradient": "both"}, "prior_gradient must be one of"),
        ({"batch_statistics": "x"}, "batch_statistics must be one of"),
        ({"curvature": "identity"}, "curvature='identity' has no posterior"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        vi(mlp(), **options)


@pytest.mark.parametrize(
    ("name", "value"), [("num_data", 0), ("prior_precision", -1.0), ("temperature", -1.0), ("posterior_floor", -0.1)]
)
def test_values_written_into_a_group_later_are_refused_by_the_step(name: str, value: float):
    model = mlp()
    optimizer = vi(model)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"KFACVI: {name} must be"):
        optimizer.step()


def test_zero_damping_is_allowed():
    model = mlp()
    train(vi(model, damping=0.0), model, 2)


def test_num_data_below_the_batch_is_explained():
    model = mlp()
    optimizer = vi(model, num_data=5)
    before = weights(model)
    with pytest.raises(ValueError, match="num_data is 5, but one batch has 8 loss terms"):
        train(optimizer, model)
    assert_same(weights(model), before)


def test_number_of_samples_is_checked_at_the_call():
    optimizer = vi(mlp())
    with pytest.raises(ValueError, match="num_samples must be an integer >= 1, got 0"):
        optimizer.weight_samples(0)


def test_laplace_numbers_are_checked():
    optimizer = KFAC(mlp())
    with pytest.raises(ValueError, match=r"KFAC.posterior: temperature must be > 0 and finite, got 0.0"):
        optimizer.posterior(10, temperature=0.0)
