"""The battery of tasks: its tasks, its contestants, its search and its score."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.battery import battery, report, rivals
from benchmarks.battery.run import Contestant, Schedule, final_loss, next_rate, search, steps_to, train
from benchmarks.battery.tasks import ALL_TASKS, KEPT_ASIDE, TASKS, _add_noise
from benchmarks.common.config import ConfigError, load_config
from benchmarks.common.results import write_json

CONFIG = Path(__file__).parents[2] / "configs" / "battery" / "all.yaml"


@pytest.fixture(scope="module")
def digits():
    return TASKS["digits_mlp"].data(Path("data"))


def test_the_config_lists_every_task_and_gives_everybody_the_same_number_of_trials():
    config = load_config(battery.BatteryConfig, CONFIG)
    budgets = {len(c.rates) + 2 + len(c.alternatives) for c in config.contestants.values() if c.rates}
    assert sorted(config.tasks) == sorted(TASKS)
    assert len(TASKS) == 15
    assert len(KEPT_ASIDE) == 3
    assert budgets == {8}


def test_an_unknown_task_is_named():
    with pytest.raises(ConfigError, match=r"tasks must be among .*digits_mlp.*, got digit_mlp"):
        load_config(battery.BatteryConfig, CONFIG, [("tasks", ["digit_mlp"])])


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("vit", torch.randn(2, 3, 32, 32)),
        ("char_lstm", torch.randint(65, (2, 32))),
        ("fields", torch.randint(2048, (2, 6))),
        ("diffusion", torch.rand(2, 197)),
    ],
)
def test_net_gives_outputs_that_the_loss_takes(name, inputs):
    task = TASKS[name]
    outputs = task.build_model(0)(inputs)
    targets = torch.randn(2, 196) if name == "diffusion" else torch.zeros(outputs.shape[:-1], dtype=torch.long)
    assert torch.isfinite(task.loss(outputs, targets))
    assert torch.isfinite(task.error(outputs, targets))


def test_weights_depend_on_the_seed_alone():
    task, state = TASKS["digits_mlp"], torch.get_rng_state()
    first, second, other = (next(iter(task.build_model(seed).parameters())) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_diffusion_noise_is_seeded_and_keeps_the_variance():
    clean = torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))
    inputs, noise = _add_noise((clean, clean), torch.Generator().manual_seed(0))
    again, _ = _add_noise((clean, clean), torch.Generator().manual_seed(0))
    assert torch.equal(inputs, again)
    assert noise.shape == clean.shape
    time = inputs[:, -1:]
    expected = (torch.pi / 2 * time).cos() * clean + (torch.pi / 2 * time).sin() * noise
    assert torch.allclose(inputs[:, :-1], expected)
    # 16,000 numbers of variance 1: four standard errors of the variance are 4 sqrt(2 / 16000)
    assert abs(inputs[:, :-1].var().item() - 1) < 4 * math.sqrt(2 / 16000)


def test_errors_of_the_three_likelihoods():
    outputs = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    assert TASKS["digits_mlp"].error(outputs, torch.tensor([0, 0])) == 0.5
    assert TASKS["two_digits"].error(outputs, torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == 0.25
    assert TASKS["diabetes"].error(outputs, torch.zeros(2, 2)) == (5 + 9.25) / 2


def test_schedules_warm_up_and_end_where_they_should():
    assert [round(Schedule("linear", 2).factor(step, 12), 3) for step in (0, 1, 2, 7, 11)] == [0.333, 0.667, 1.0, 0.5, 0.1]
    assert Schedule("cosine", 0).factor(5, 10) == pytest.approx(0.5)
    assert Schedule("constant", 0).factor(9, 10) == 1.0
    assert [Schedule("wsd", 0).factor(step, 10) for step in (0, 8, 9)] == pytest.approx([1.0, 1.0, 0.5])


def test_final_loss_and_steps_are_read_from_means_of_a_tenth():
    losses = [float(value) for value in range(100, 0, -1)]
    assert final_loss(losses, 100) == 5.5
    assert steps_to(losses, 100, 5.5) == 95.0
    assert steps_to(losses, 100, 50.5) == 50.0
    assert steps_to(losses, 100, 5.0) is None
    assert final_loss(losses[:-1], 100) == math.inf


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({0.1: 1.0, 1.0: 2.0}, 0.1 / 10**0.5),
        ({0.1: 2.0, 1.0: 1.0}, 10**0.5),
        ({0.1: 2.0, 1.0: 1.0, 10.0: 3.0}, 0.1**0.5),
        ({0.1: math.inf, 1.0: math.inf}, 0.1 / 10**0.5),
    ],
)
def test_next_rate_goes_over_the_edge_or_towards_the_better_neighbour(tried, expected):
    assert next_rate(tried) == pytest.approx(expected)


def test_search_finds_the_bottom_and_spends_its_budget():
    seen = []

    def measure(settings):
        seen.append(settings)
        return abs(math.log10(settings["lr"] / 0.06)) - 0.1 * settings.get("momentum", 0)

    contestant = Contestant("sgd", "SGD", {"weight_decay": 0.0}, [0.001, 0.01, 0.1, 1.0], [{"momentum": 0.5}, {"momentum": 0.9}])
    best = search(contestant, 1.0, measure)
    assert len(seen) == 8
    assert len({str(settings) for settings in seen}) == 8
    assert best == {"weight_decay": 0.0, "lr": 0.05623, "momentum": 0.9}


def test_search_without_rates_measures_nothing():
    assert search(Contestant("kfac", "KFAC", {"lr": 0.1}), 1.0, lambda settings: pytest.fail("measured")) == {"lr": 0.1}


def test_muon_moves_convolutions_as_matrices_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 2))
    twin = [nn.Parameter(net[1].weight.detach().clone().flatten(1)), nn.Parameter(net[3].weight.detach().clone())]
    first = net[0].weight.detach().clone()
    optimizer = rivals.build("muon", net, {"lr": 0.1}, "categorical", 0)
    net(torch.randn(3, 1, 5, 5)).square().sum().backward()
    for parameter, source in zip(twin, (net[1].weight, net[3].weight), strict=True):
        parameter.grad = source.grad.reshape(parameter.shape).clone()
    torch.optim.Muon(twin, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    optimizer.step()
    assert torch.equal(net[1].weight.flatten(1), twin[0])
    assert torch.equal(net[3].weight, twin[1])
    # Adam's first step is lr · sign of the gradient, after decay
    moved = first * (1 - 3e-3 * 0.01) - 3e-3 * net[0].weight.grad.sign()
    assert torch.allclose(net[0].weight, moved, atol=1e-6)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("char_lstm", ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
        ("fields", ["hidden.weight", "middle.weight"]),
        ("lenet5", ["3.weight", "7.weight", "9.weight"]),
        ("vit", [f"blocks.{i}.{name}.weight" for i in range(4) for name in ("attention.qkv", "attention.out", "up", "down")]),
    ],
)
def test_muon_takes_the_hidden_weights(name, hidden):
    net = TASKS[name].build_model(0)
    _, muon = rivals.build("muon", net, {"lr": 0.1}, "categorical", 0)._parts
    taken = {p.data_ptr() for p in muon.param_groups[0]["params"]}
    assert [key for key, p in net.named_parameters() if p.data_ptr() in taken] == hidden


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_a_missing_package_is_named_with_its_remedy(name, monkeypatch):
    for module in ("pytorch_optimizer", "distributed_shampoo.distributed_shampoo"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=f"contestant '{name}' needs .*pip install"):
        rivals.build(name, nn.Linear(2, 2), {}, "categorical", 0)


def test_a_broken_run_is_a_result(digits):
    task = TASKS["digits_mlp"]
    result = train(task, digits, lambda net: torch.optim.SGD(net.parameters(), lr=1e8), 0, Schedule())
    assert result["final_loss"] == math.inf
    assert result["diverged_step"] < 20
    assert math.isnan(result["test_error"])


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_TASKS, "digits_mlp", dataclasses.replace(TASKS["digits_mlp"], steps=20))
    overrides = [("tasks", ["digits_mlp"]), ("only", ["adamw"]), ("out", str(tmp_path)), ("seeds", [0])]
    config = load_config(battery.BatteryConfig, CONFIG, overrides)
    found = battery.run(config)
    log = tmp_path / "all" / "runs.jsonl"
    assert len(log.read_text().splitlines()) == 9
    assert found["digits_mlp"]["adamw"]["runs"][0]["final_loss"] < 1.0
    monkeypatch.setattr(battery, "train", lambda *arguments: pytest.fail("trained again"))
    assert battery.run(config) == found


def _entry(losses, per_step, test_error=(0.1, 0.1, 0.1)):
    runs = [
        {"losses": c, "final_loss": final_loss(c, len(c)), "test_loss": 1.0, "test_error": e}
        for c, e in zip(losses, test_error, strict=True)
    ]
    return {"settings": {"lr": 0.1}, "runs": runs, "num_steps": len(losses[0]), "seconds_per_step": per_step}


@pytest.fixture
def content():
    """AdamW gets to 1 at the end of 200 steps; another in half of them, at the price of three; a third never."""
    line = [2.0] * 180 + [1.0] * 20
    soon, never = [2.0] * 90 + [0.5] * 110, [2.0] * 200
    found = {
        task: {
            "adamw": _entry([line] * 3, 1.0),
            "kfac": _entry([soon, soon, soon], 3.0, (0.1, 0.11, 0.12)),
            "sgd": _entry([never] * 3, 0.5, (0.3, 0.3, 0.3)),
        }
        for task in ("digits_mlp", "fields")
    }
    return report.summarize(found, {"adamw": "AdamW", "kfac": "KFAC", "sgd": "SGD"})


def test_scores_are_shares_of_adamws_steps_and_seconds(content):
    # windows of 20: the first whose mean of 2s and 0.5s is at most 1 starts at step 84, its middle is 94
    table = report.scores(content, ["digits_mlp", "fields"])
    assert table["kfac"]["steps"] == pytest.approx(94 / 200)
    assert table["kfac"]["seconds"] == pytest.approx(3 * 94 / 200)
    assert table["sgd"]["steps"] == report.NOT_REACHED
    assert table["sgd"]["seconds"] == 1.0
    assert [table[name]["reached"] for name in table] == [2, 2, 0]
    assert [table[name]["lowest_loss"] for name in table] == [0, 2, 0]
    assert [table[name]["fastest"] for name in table] == [2, 0, 2]
    assert [table[name]["error_near_best"] for name in table] == [2, 0, 0]
    assert report.duels(content, "kfac", "adamw") == (2, 2)
    del content["tasks"]["fields"]["kfac"]
    assert report.scores(content, ["digits_mlp", "fields"])["kfac"]["tasks"] == 1
    assert report.duels(content, "kfac", "sgd") == (1, 1)


def test_report_is_made_of_the_kept_json_alone(content, tmp_path):
    report.write(write_json(tmp_path / "all.json", content))
    text = (tmp_path / "all.md").read_text()
    assert "| digits, MLP 64-128-128-10 | 1.00 | 0.47 | 2.00 (3) |" in text
    assert "| SGD | 1 | 2.00 | 1.00 | 0 | 0 | 1 | 0 | 0 |" in text  # the one task that was kept aside
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_contestants_that_are_not_run_now_are_reported_as_far_as_they_went(tmp_path):
    config = load_config(battery.BatteryConfig, CONFIG, [("tasks", ["digits_mlp"]), ("only", []), ("out", str(tmp_path))])
    assert battery.run(config) == {}


def test_a_shorter_run_has_a_schedule_of_its_own_and_is_measured_in_the_tasks_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_TASKS, "digits_mlp", dataclasses.replace(TASKS["digits_mlp"], steps=40))
    rates, adamw = {"fixed": {"lr": 0.02}, "rates": [], "alternatives": []}, {"optimizer": "adamw", "label": "AdamW"}
    contestants = {"adamw": {**adamw, **rates}, "half": {**adamw, **rates, "length": 0.5}}
    overrides = [("tasks", ["digits_mlp"]), ("contestants", contestants), ("out", str(tmp_path)), ("seeds", [0])]
    found = battery.run(load_config(battery.BatteryConfig, CONFIG, overrides))["digits_mlp"]
    assert len(found["half"]["runs"][0]["losses"]) == 20
    half = found["half"]["runs"][0]["losses"]
    found["adamw"]["runs"][0]["final_loss"] = target = sum(half[-2:]) / 2
    middles = [place for place in range(1, 20) if sum(half[place - 1 : place + 1]) / 2 <= target]
    assert report.summarize({"digits_mlp": found}, {})["tasks"]["digits_mlp"]["half"]["steps"] == [middles[0] / 40]
