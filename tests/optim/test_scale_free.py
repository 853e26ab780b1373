"""``update_scale="rms"``: steps of a given size, whatever the scale of loss and gradient; a pace that feels oscillation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from kfac_opt._step.rules import RmsRule
from kfac_opt._step.scale_free import ScaleFreeRule, StepSettings, averaged_noise
from kfac_opt._step.update import Directions
from kfac_opt.damping import LevenbergMarquardt, TrustRegionDamping
from kfac_opt.layers import MatrixLayout
from tests.optim.test_state import batch, make
from tests.support import assert_same, close, data, mlp, train_step, weights

DOUBLE = torch.float64
RULE = ScaleFreeRule()
pytestmark = pytest.mark.filterwarnings("ignore:KFAC. no layer adapter covers")


def build(model: nn.Module, params: Any = None, **options: Any) -> KFAC:
    return KFAC(model, params, **{"update_scale": "rms", "lr": 0.01, "factor_dtype": DOUBLE, **options})


# ---------------------------------------------------------------------------------------------
# the whole rule against a simulation that takes directions from a twin


class Simulation:
    """The docstring's formulas, one layer after the other, in plain numbers."""

    def __init__(self, twin: nn.Module, directions: KFAC, lr: float, momentum: float, nesterov: bool, bound: float | None):
        self.twin, self.directions, self.lr, self.bound = twin, directions, lr, bound
        self.momentum, self.nesterov = momentum, nesterov
        self.buffers = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
        self.average: dict[str, float] = {}
        self.weight = 0.0
        self.pace = {"0": 1.0, "2": 1.0}

    def step(self, x: Tensor, y: Tensor, decay: float, sign: float) -> None:
        self.directions.zero_grad()
        F.cross_entropy(self.twin(x), y).backward()
        gradient = {n: sign * p.grad for n, p in self.twin.named_parameters()}
        beta = self.momentum
        self.weight = 0.9 * self.weight + 0.1
        averaged = {}
        for name, g in gradient.items():
            self.buffers[name] = beta * self.buffers[name] + (1 - beta) * g
            averaged[name] = (1 - beta) * g + beta * self.buffers[name] if self.nesterov else self.buffers[name].clone()
            self.average[name] = 0.9 * self.average.get(name, 0.0) + 0.1 * float(g.norm())
        for name, p in self.twin.named_parameters():
            p.grad = averaged[name].clone()
        self.directions.precondition_gradients_()
        for layer in ("0", "2"):
            self._move(layer, decay)

    def _move(self, layer: str, decay: float) -> None:
        names = [f"{layer}.weight", f"{layer}.bias"]
        parts = [self.twin.get_parameter(name) for name in names]
        usual = math.sqrt(sum((self.average[name] / self.weight) ** 2 for name in names))
        signal = math.sqrt(sum(float(self.buffers[name].square().sum()) for name in names))
        noise = math.sqrt((1 - self.momentum) / (1 + self.momentum))
        change = 0.1 * max(-1.0, min(1.0, signal / (0.35 * noise * usual) - 1.0))
        self.pace[layer] = min(1.0, self.pace[layer] * math.exp(change))
        out_dim, in_dim = parts[0].shape
        numel = out_dim * (in_dim + 1)
        size = 4.0 * math.sqrt(out_dim / (in_dim * max(out_dim, in_dim))) * math.sqrt(numel)
        length = self.pace[layer] * self.lr * size
        if self.bound is not None:
            norm = math.sqrt(sum(float(p.detach().square().sum()) for p in parts))
            length = min(length, self.bound * max(norm, 0.1 * math.sqrt(out_dim)))
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parts))
        with torch.no_grad():
            for p in parts:
                p.mul_(1 - self.lr * decay).sub_(length / norm * p.grad)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"nesterov": False},
        {"momentum": 0.0},
        {"max_relative_update": None},
        {"weight_decay": 0.3},
        {"maximize": True},
        {"power": 1.0, "damping": 0.1, "damping_style": "exact", "lr": 0.1},
        {"curvature": "eigenbasis", "momentum": 0.5},
    ],
    ids=str,
)
def test_steps_follow_the_formulas(rule, foreach):
    settings = {"lr": 0.02, "factor_interval": 2, "inverse_interval": 3, "fisher": "exact", **rule}
    ours, twin = mlp(), mlp()
    optimizer = build(ours, foreach=foreach, **settings)
    chosen = {key: value for key, value in settings.items() if key != "maximize"}
    simulation = Simulation(
        twin,
        build(twin, **chosen),
        settings["lr"],
        settings.get("momentum", 0.9),
        settings.get("nesterov", True),
        settings.get("max_relative_update", 0.06),
    )
    for seed in range(12):
        x, y = data(8, seed=seed)
        train_step(optimizer, ours, x, y)
        simulation.step(x, y, settings.get("weight_decay", 0.0), -1.0 if rule.get("maximize") else 1.0)
    for p, q in zip(ours.parameters(), twin.parameters()):
        close(p.detach(), q.detach(), rtol=1e-9)
    assert float(ours[0].weight.sub(mlp()[0].weight).norm()) > 0.01


# ---------------------------------------------------------------------------------------------
# scale


def trained(factor: float, dtype: torch.dtype, *, on: str = "loss", **options: Any) -> dict[str, Tensor]:
    model = make(dtype)
    optimizer = KFAC(model, update_scale="rms", **{"factor_interval": 2, "inverse_interval": 3, "ramp_steps": 2, **options})
    for seed in range(7):
        x, y = batch(seed)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if on == "loss":
            (factor * loss).backward()
        else:
            loss.backward()
            for parameter in model.parameters():
                parameter.grad.mul_(factor)
        optimizer.step()
    return weights(model)


KINDS = [
    {},
    {"curvature": "eigenbasis"},
    {"curvature": "diagonal"},
    {"damping_style": "exact", "power": 1.0},
    {"fisher": "exact", "damping_scale": "relative", "damping": 1e-5},
    {"fisher": "empirical"},
    {"momentum": 0.0, "weight_decay": 0.1, "max_relative_update": None},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_powers_of_two_on_the_loss_or_the_gradients_change_no_bit(options):
    expected = trained(1.0, torch.float32, **options)
    assert_same(trained(2.0**-20, torch.float32, **options), expected)
    if options.get("fisher") != "empirical":
        assert_same(trained(2.0**20, torch.float32, on="gradients", **options), expected)


@pytest.mark.parametrize("options", KINDS[:5], ids=str)
def test_any_factor_on_the_loss_changes_nothing_beyond_rounding(options):
    expected = trained(1.0, DOUBLE, **options)
    for factor in (1e-6, 7.3, 1e6):
        for name, found in trained(factor, DOUBLE, **options).items():
            close(found, expected[name], rtol=1e-12)


def test_gradients_near_the_end_of_single_precision_move_the_weights_as_any_other():
    expected = trained(1.0, torch.float32)
    for exponent in (-80, 40):  # squares are beyond its lower end
        assert_same(trained(2.0**exponent, torch.float32, on="gradients"), expected)


# ---------------------------------------------------------------------------------------------
# sizes


def test_a_step_has_the_size_of_its_layers_shape():
    torch.manual_seed(0)
    for in_dim, out_dim in ((64, 16), (16, 64), (32, 32)):
        layer = nn.Linear(in_dim, out_dim, bias=False).to(DOUBLE)
        optimizer = build(layer, lr=1e-3, max_relative_update=None)
        before = layer.weight.detach().clone()
        train_step(optimizer, layer, torch.randn(200, in_dim, dtype=DOUBLE), torch.randint(out_dim, (200,)))
        size = 4.0 * math.sqrt(out_dim / (in_dim * max(in_dim, out_dim)))
        assert float((layer.weight - before).detach().square().mean().sqrt()) == pytest.approx(1e-3 * size, rel=1e-9)


@pytest.mark.parametrize("bound", [0.03, 0.001])
def test_no_layer_moves_further_than_the_bound(bound):
    model = mlp()
    optimizer = build(model, lr=1.0, max_relative_update=bound)
    for seed in range(5):
        before = weights(model)
        train_step(optimizer, model, *data(seed=seed))
        for layer in ("0", "2"):
            names = [f"{layer}.weight", f"{layer}.bias"]
            moved = math.sqrt(sum(float((model.get_parameter(n) - before[n]).square().sum()) for n in names))
            size = math.sqrt(sum(float(before[n].square().sum()) for n in names))
            assert moved == pytest.approx(bound * size, rel=1e-9)


def test_layers_initialised_at_zero_move():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    optimizer = build(model)
    losses = [train_step(optimizer, model, *data()) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("zeros", [True, False])
def test_a_layer_without_a_gradient_stays_where_it_is(zeros):
    """Its momentum still points somewhere, and a direction of a given length would follow it for ever."""
    model = mlp()
    optimizer = build(model)
    for seed in range(3):
        train_step(optimizer, model, *data(seed=seed))
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(data()[0]), data()[1]).backward()
        for parameter in model[0].parameters():
            parameter.grad = torch.zeros_like(parameter) if zeros else None
        optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_rows_of_an_embedding_that_no_batch_holds_do_not_lengthen_the_steps_of_the_others():
    moves = []
    for vocabulary in (8, 800):
        layout = MatrixLayout("transposed", (vocabulary, 4))
        direction = torch.zeros(vocabulary, 4, dtype=DOUBLE)
        direction[:8] = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]], dtype=DOUBLE).repeat(4, 1)
        parameter = torch.ones(vocabulary, 4, dtype=DOUBLE)
        found = Directions()
        found.add_block(torch.ones(()), layout, torch.ones(()), table=True)
        found.add(parameter, direction, direction, 0)
        step = StepSettings(0.01, 0.9, None)
        factors = RULE.factors(found, [direction], [direction], [RULE.init_state(torch.device("cpu"))], step)
        moves.append(factors * direction[:8])
    close(moves[1], moves[0])
    assert float(moves[0].square().mean().sqrt()) == pytest.approx(0.01 * RULE.vector)


# ---------------------------------------------------------------------------------------------
# the pace


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.95])
def test_averaged_noise_is_the_length_of_the_averages_weights(momentum):
    """The answer of the momentum to one unit gradient, step by step, is the weights that it gives to the past."""
    buffer, squares = torch.zeros(1, dtype=DOUBLE), 0.0
    for step in range(2000):
        impulse = torch.tensor([1.0 if step == 0 else 0.0], dtype=DOUBLE)
        squares += float(RULE.averaged_([impulse], [buffer], momentum, nesterov=False, foreach=True)[0]) ** 2
    assert averaged_noise(momentum) == pytest.approx(math.sqrt(squares), rel=1e-12)


def paces(gradients: list[Tensor], momentum: float = 0.9) -> list[float]:
    parameter, buffer = torch.ones_like(gradients[0]), torch.zeros_like(gradients[0])
    state = RULE.init_state(torch.device("cpu"))
    found_paces = []
    for gradient in gradients:
        averaged = RULE.averaged_([gradient], [buffer], momentum, nesterov=True, foreach=True)[0]
        found = Directions()
        found.add_block(torch.ones(()), MatrixLayout("matrix", tuple(gradient.shape)), torch.ones(()))
        found.add(parameter, averaged, averaged, 0)
        RULE.factors(found, [gradient], [buffer], [state], StepSettings(0.01, momentum, None))
        found_paces.append(math.exp(float(state[2])))
    return found_paces


def test_the_pace_stays_whole_for_noise_and_for_a_steady_gradient():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(20, 20, dtype=DOUBLE, generator=generator) for _ in range(300)]
    assert min(paces(noise)) > 0.99
    assert min(paces([torch.ones(4, 4, dtype=DOUBLE) * 0.9**step for step in range(300)])) == 1.0


def test_the_pace_falls_where_gradients_alternate_and_comes_back_where_they_do_not():
    alternating = [torch.ones(4, 4, dtype=DOUBLE) * (-1.0) ** step for step in range(80)]
    found = paces(alternating + [torch.ones(4, 4, dtype=DOUBLE)] * 60)
    assert found[79] < 0.1
    assert found[-1] == 1.0


def test_a_constant_learning_rate_converges_where_fixed_steps_cannot():
    """A realisable regression: the step has to shrink with its error, and no schedule tells it to."""

    def final_loss(rule: ScaleFreeRule) -> float:
        torch.manual_seed(0)
        x = torch.randn(64, 6, dtype=DOUBLE)
        y = x @ torch.randn(6, 3, dtype=DOUBLE)
        model = nn.Linear(6, 3).to(DOUBLE)
        optimizer = build(model, likelihood="gaussian", lr=0.02)
        optimizer._rule = RmsRule(rule)
        for _ in range(400):
            loss = train_step(optimizer, model, x, y, lambda out, target: 0.5 * (out - target).square().sum(1).mean())
        return loss

    assert final_loss(RULE) < 1e-6
    assert final_loss(ScaleFreeRule(gain=0.0)) > 1e-5


# ---------------------------------------------------------------------------------------------
# company


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "one cycle"])
def test_schedules_of_torch_drive_it(schedule):
    model, (x, y) = mlp(), data()
    optimizer = build(model, lr=0.05)
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 60),
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60),
    }[schedule]()
    losses = []
    for _ in range(60):
        losses.append(train_step(optimizer, model, x, y))
        scheduler.step()
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("after", [1, 4, 7])
def test_resuming_is_bitwise_identical(after):
    model = make(torch.float32)
    optimizer = KFAC(model, update_scale="rms", factor_interval=2, inverse_interval=3, ramp_steps=0)
    for seed in range(after):
        train_step(optimizer, model, *batch(seed))
    again = make(torch.float32)
    again.load_state_dict(model.state_dict())
    other = KFAC(again, update_scale="rms", factor_interval=2, inverse_interval=3, ramp_steps=0)
    other.load_state_dict(optimizer.state_dict())
    for seed in range(after, after + 5):
        train_step(optimizer, model, *batch(seed))
        train_step(other, again, *batch(seed))
    assert_same(weights(again), weights(model))
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_step_that_the_scaler_skips_changes_nothing():
    model, (x, y) = mlp(), data()
    optimizer, scaler = build(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for poison in (False, False, True, False):
        before, pace = weights(model), [s["pace"].clone() for s in optimizer.state.values() if "pace" in s]
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if poison:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if poison:
            assert_same(weights(model), before)
            assert_same([s["pace"] for s in optimizer.state.values()], pace)
        else:
            assert not torch.equal(model[0].weight, before["0.weight"])


def test_parameters_without_curvature_are_plain_sgd_in_any_company():
    ours, theirs = mlp(), mlp()
    optimizer = build(ours, curvature="identity", lr=0.1, momentum=0.9, nesterov=False)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for seed in range(4):
        train_step(optimizer, ours, *data(seed=seed))
        train_step(sgd, theirs, *data(seed=seed))
    assert_same(weights(ours), weights(theirs))


# ---------------------------------------------------------------------------------------------
# what has no effect is an error


def test_a_trust_region_in_nats_is_refused():
    with pytest.raises(ValueError, match=r"KFAC: kl_clip has no effect with update_scale='rms'.* got 0\.001"):
        build(mlp(), kl_clip=1e-3)
    optimizer = build(mlp())
    optimizer.param_groups[0]["kl_clip"] = 0.1
    with pytest.raises(ValueError, match="kl_clip has no effect"):
        optimizer.step()


def test_one_rule_for_all_groups():
    model = mlp()
    groups = [{"params": model[0].parameters(), "update_scale": "natural"}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match=r"update_scale holds for all parameter groups, got 'natural' .*'rms'"):
        build(model, groups)


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"update_scale must be one of \['rms', 'natural'\], got 'adam'"):
        build(mlp(), update_scale="adam")


def test_a_state_of_the_other_rule_is_refused():
    model = mlp()
    optimizer = KFAC(model, update_scale="natural")
    train_step(optimizer, model, *data())
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"saved with update_scale='natural', this optimizer has 'rms'"):
        build(mlp()).load_state_dict(state)


@pytest.mark.parametrize("value", [torch.zeros(2, dtype=DOUBLE), torch.full((3,), math.nan, dtype=DOUBLE), 1.0])
def test_a_damaged_pace_is_refused(value):
    model = mlp()
    optimizer = build(model)
    train_step(optimizer, model, *data())
    state = optimizer.state_dict()
    state["state"][0] = {**state["state"][0], "pace": value}
    with pytest.raises(ValueError, match=r"'0\.weight': 'pace'"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("rule", [TrustRegionDamping, LevenbergMarquardt])
def test_damping_that_adapts_to_the_trust_region_is_refused(rule):
    with pytest.raises(ValueError, match=rf"{rule.__name__}: .*update_scale='rms'"):
        rule(build(mlp()))
