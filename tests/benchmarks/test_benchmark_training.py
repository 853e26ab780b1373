"""The training loop measures itself and takes a divergence for a result."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from benchmarks.common.data import DataConfig
from benchmarks.common.tasks import ScheduleConfig, Task, TaskConfig
from benchmarks.common.train import History, Loop, train

CONFIG = TaskConfig(
    DataConfig("digits", num_train=256, num_test=64, flatten=True),
    {"name": "mlp", "sizes": [64, 16, 10]},
    steps=12,
    batch_size=32,
    eval_interval=5,
)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(CONFIG)


def sgd(lr: float):
    return lambda model, seed: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_training_lowers_the_loss_and_notes_every_evaluation(task: Task):
    history = train(task, sgd(0.1), seed=0)
    assert history.steps == [0, 5, 10, 12]
    assert len(history.batch_loss) == 12
    assert history.train_loss[-1] < 0.8 * history.train_loss[0]
    assert history.seconds == sorted(history.seconds)
    assert 0 <= history.test_error[-1] <= 1
    assert not history.diverged


def test_the_same_seed_gives_the_same_run_and_another_seed_another(task: Task):
    first, again, other = (train(task, sgd(0.1), seed=seed) for seed in (0, 0, 1))
    assert first.train_loss == again.train_loss
    assert first.train_loss != other.train_loss


def test_a_run_that_breaks_is_a_result(task: Task):
    history = train(task, sgd(1e30), seed=0)
    assert history.diverged
    assert history.diverged_step is not None
    assert history.final_loss == math.inf
    assert history.steps[-1] < CONFIG.steps
    stored = History.from_dict(json.loads(json.dumps(history.to_dict()).replace("Infinity", "null")))
    assert stored.diverged_step == history.diverged_step
    assert stored.final_loss == math.inf


def test_a_run_that_ends_above_its_first_loss_counts_as_diverged():
    history = History(steps=[0, 1], seconds=[0.0, 1.0], train_loss=[2.0, 2.5], batch_loss=[2.0, 9.0])
    assert history.diverged
    assert history.num_spikes() == 1
    assert history.final_loss == 2.5


class GivesUp(torch.optim.SGD):
    """Raises at its first step, as an optimizer does whose factorisation fails."""

    def step(self, closure=None):
        raise RuntimeError("cannot factorise")


def test_an_optimizer_that_gives_up_on_broken_numbers_has_diverged(task: Task, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task, "loss", lambda outputs, targets: (outputs * math.inf).sum())
    history = train(task, lambda model, seed: GivesUp(model.parameters(), lr=0.1), seed=0)
    assert (history.diverged_step, history.message) == (0, "cannot factorise")


def test_an_error_with_healthy_numbers_is_not_swallowed(task: Task):
    with pytest.raises(RuntimeError, match="cannot factorise"):
        train(task, lambda model, seed: GivesUp(model.parameters(), lr=0.1), seed=0)


def test_the_schedule_reaches_every_group(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def build(model: nn.Module, seed: int) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return Watched([{"params": [first], "lr": 1.0}, {"params": rest, "lr": 0.1}], lr=1.0)

    config = dataclasses.replace(CONFIG, steps=4, schedule=ScheduleConfig("linear"))
    train(Task(config), build, seed=0)
    assert [rates[0] for rates in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [rates[1] for rates in seen] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_what_is_done_while_the_clock_is_stopped_does_not_count(task: Task, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.common.train.time.perf_counter", lambda: now[0])

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            now[0] += 1.0

    model = task.build_model(0)
    loop = Loop(model, Slow(model.parameters(), lr=0.1), task.batches(0), task.loss, 5)
    for done, _ in loop:
        if done % 2 == 0:
            with loop.stopped():
                now[0] += 100.0
        if done == 3:
            break
    assert loop.seconds == 3.0


def test_reach_is_the_first_evaluation_at_or_below_the_target():
    history = History(steps=[0, 5, 10], seconds=[0.0, 0.1, 0.2], train_loss=[2.0, 1.0, 0.5])
    assert history.reach(1.0) == (5, 0.1)
    assert history.reach(0.1) is None


def test_evaluation_is_that_of_the_whole_set_and_leaves_the_mode(task: Task):
    model = task.build_model(0)
    model.train()
    evaluation = task.evaluate(model, "train")
    assert model.training
    with torch.no_grad():
        outputs = model(task.dataset.train_inputs)
    expected = nn.functional.cross_entropy(outputs.double(), task.dataset.train_targets)
    assert evaluation.loss == pytest.approx(float(expected), rel=1e-5)
    wrong = (outputs.argmax(1) != task.dataset.train_targets).double().mean()
    assert evaluation.error == pytest.approx(float(wrong))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_losses_are_the_negative_log_likelihoods_of_the_package(likelihood: str):
    from benchmarks.common.tasks import LOSSES
    from kfac_opt.likelihoods import Bernoulli, Categorical, Gaussian

    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 4, generator=generator)
    targets = torch.randint(4, (6,), generator=generator) if likelihood == "categorical" else torch.rand(6, 4)
    package = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian()}[likelihood]
    torch.testing.assert_close(LOSSES[likelihood](outputs, targets), package.loss(outputs, targets))


def test_the_squared_error_of_an_autoencoder_is_that_of_its_pixels():
    data = DataConfig("digits", num_train=64, num_test=32, flatten=True, target="inputs")
    model = {"name": "autoencoder", "sizes": [64, 8, 2]}
    task = Task(TaskConfig(data, model, likelihood="bernoulli", steps=2, batch_size=32))
    net = task.build_model(0)
    evaluation = task.evaluate(net, "test")
    with torch.no_grad():
        error = (torch.sigmoid(net(task.dataset.test_inputs)) - task.dataset.test_targets).square().sum(1).mean()
    assert evaluation.error == pytest.approx(float(error), rel=1e-5)
    assert train(task, sgd(1e-3), seed=0).steps[-1] == 2
