"""Data, models, search and results that the experiments share."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from urllib.error import URLError

import optuna
import pytest
import torch
from torch import nn

from benchmarks.common import results
from benchmarks.common.config import ConfigError
from benchmarks.common.data import DataConfig, batch_stream, load_data
from benchmarks.common.figures import Curve, line_figure, spread
from benchmarks.common.memory import peak_bytes
from benchmarks.common.models import build_model
from benchmarks.common.optimizers import build_optimizer, hidden_matrices, muon_applies, state_bytes
from benchmarks.common.report import Finding, Report, Table, findings_table, verdict, write_page
from benchmarks.common.search import OptimizerConfig, SearchConfig, SearchRange, search
from benchmarks.common.statistics import mean_and_error, median, text
from benchmarks.common.tasks import ScheduleConfig
from benchmarks.common.timing import Timed, cycle_ratio, interleave, percentile

LR = SearchRange(low=1e-3, high=1.0, log=True)


def test_digits_are_standardised_and_split_once():
    data = load_data(DataConfig("digits", flatten=True), "unused")
    assert data.train_inputs.shape == (1437, 64)
    assert data.test_inputs.shape == (360, 64)
    assert data.num_classes == 10
    torch.testing.assert_close(data.train_inputs.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_inputs.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    again = load_data(DataConfig("digits", flatten=True), "unused")
    assert torch.equal(data.train_inputs, again.train_inputs)
    fewer = load_data(DataConfig("digits", num_train=100), "unused")
    assert fewer.train_inputs.shape == (100, 1, 8, 8)


def test_an_autoencoder_sees_the_pixels_that_it_reproduces():
    data = load_data(DataConfig("digits", flatten=True, target="inputs"), "unused")
    assert torch.equal(data.train_inputs, data.train_targets)
    assert 0 <= data.train_targets.min() < data.train_targets.max() <= 1


def test_each_epoch_holds_every_example_once_in_a_new_order():
    inputs = torch.arange(12)
    batches = batch_stream(inputs, inputs, batch_size=4, seed=0)
    epochs = [torch.cat([next(batches)[0] for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert not torch.equal(epochs[0], epochs[1])
    again = batch_stream(inputs, inputs, batch_size=4, seed=0)
    assert torch.equal(next(again)[0], epochs[0][:4])


def test_batches_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    next(batch_stream(torch.arange(9), torch.arange(9), 3, seed=5))
    build_model({"name": "mlp"}, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size must be between 1 and the number of examples 3, got 4"):
        next(batch_stream(torch.arange(3), torch.arange(3), 4, seed=0))


def test_missing_data_without_network_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from torchvision import datasets

    class Offline:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            raise URLError("no network") if download else RuntimeError("Dataset not found.")

    monkeypatch.setattr(datasets, "MNIST", Offline)
    with pytest.raises(ConfigError, match=r"'mnist' is not below .* could not be downloaded.*--data-root"):
        load_data(DataConfig("mnist"), tmp_path)
    with pytest.raises(ConfigError, match=r"Tiny Shakespeare was not found: no file .*input\.txt.*--data-root"):
        load_data(DataConfig("shakespeare"), tmp_path)


def test_text_windows_are_shifted_by_one_token(tmp_path: Path):
    text = "".join(chr(97 + number % 26) for number in range(400))
    (tmp_path / "input.txt").write_text(text)
    data = load_data(DataConfig("shakespeare", context=16), tmp_path)
    assert data.num_classes == 26
    assert data.train_inputs.shape[1] == 16
    assert torch.equal(data.train_inputs[:, 1:], data.train_targets[:, :-1])
    assert data.train_inputs[1, 0] == 8  # windows start at every half context
    with pytest.raises(ValueError, match=r"key 'data\.context' must be below the number of tokens"):
        load_data(DataConfig("shakespeare", context=500), tmp_path)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"name": "mlp", "sizes": [64, 128, 128, 10]}, 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ({"name": "deep_linear"}, 64 * 100 + 100 + 4 * (100 * 100 + 100) + 100 * 10 + 10),
        ({"name": "lenet5"}, 62006),  # as published for CIFAR-10
        ({"name": "resnet18"}, 11173962),  # as published for the 32 × 32 variant
        ({"name": "autoencoder"}, 2 * (784 * 1000 + 1000 * 500 + 500 * 250 + 250 * 30) + 2 * 1750 + 784 + 30),
    ],
)
def test_models_have_the_published_number_of_parameters(config: dict, parameters: int):
    assert sum(p.numel() for p in build_model(config, seed=0).parameters()) == parameters


@pytest.mark.parametrize("fused_qkv", [False, True])
def test_gpt_does_not_look_into_the_future(fused_qkv: bool):
    model = build_model(
        {"name": "gpt", "vocabulary": 11, "context": 8, "num_layers": 2, "width": 16, "fused_qkv": fused_qkv}, seed=0
    )
    tokens = torch.arange(8).reshape(1, 8)
    changed = tokens.clone()
    changed[0, 5] = 10
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 8, 11)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_unknown_models_and_arguments_are_named():
    with pytest.raises(ConfigError, match=r"'model\.name' must be one of mlp, .*, got 'lstm'"):
        build_model({"name": "lstm"}, seed=0)
    with pytest.raises(ConfigError, match=r"unknown key 'model\.widht'; allowed: .*Did you mean 'width'"):
        build_model({"name": "small_cnn", "widht": 3}, seed=0)
    with pytest.raises(ValueError, match=r"width' must be a multiple of num_heads 4, got 10"):
        build_model({"name": "gpt", "width": 10, "num_heads": 4}, seed=0)


def test_optimizers_refuse_unknown_names_and_settings():
    model = build_model({"name": "mlp"}, seed=0)
    with pytest.raises(ConfigError, match="optimizer must be one of sgd, adamw, muon, kfac, ekfac, got 'lion'"):
        build_optimizer("lion", model, {})
    with pytest.raises(ConfigError, match=r"unknown key 'sgd\.learning_rate'; allowed: .*lr"):
        build_optimizer("sgd", model, {"learning_rate": 0.1})


def test_state_bytes_count_every_tensor_once():
    model = nn.Linear(10, 10, bias=False)
    for name, copies in (("sgd", 1), ("adamw", 2)):
        settings = {"lr": 0.1, "momentum": 0.9} if name == "sgd" else {"lr": 0.1}
        optimizer = build_optimizer(name, model, settings)
        model(torch.ones(1, 10)).sum().backward()
        optimizer.step()
        assert state_bytes(optimizer) in (400 * copies, 400 * copies + 4)  # AdamW counts its steps in a tensor


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch >= 2.9")
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = build_model({"name": "mlp", "sizes": [6, 5, 4, 3]}, seed=0)
    assert [tuple(matrix.shape) for matrix in hidden_matrices(model)] == [(4, 5)]
    optimizer = build_optimizer("muon", model, {"lr": 0.1, "adamw_lr": 0.01})
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.01, 0.1]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad.any())
    optimizer.param_groups[0]["lr"] = 0.5  # a schedule writes here
    assert optimizer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_muon_is_left_out_where_there_is_no_hidden_matrix():
    model = nn.Linear(3, 2)
    assert not muon_applies(model)
    with pytest.raises(ConfigError, match="0 hidden matrices"):
        build_optimizer("muon", model, {})


def test_schedules_start_and_end_where_they_say():
    linear = ScheduleConfig("linear", final=0.1, warmup_steps=2)
    factors = [linear.factor(step, 12) for step in range(12)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert factors[-1] == pytest.approx(1 - 0.9 * 0.9)
    cosine = ScheduleConfig("cosine")
    assert cosine.factor(0, 10) == pytest.approx(1.0)
    assert cosine.factor(5, 10) == pytest.approx(0.5)
    assert ScheduleConfig().factor(7, 10) == 1.0


def bowl(settings: dict) -> float:
    """Lowest at lr 0.1; broken above 0.5."""
    return math.nan if settings["lr"] > 0.5 else (math.log10(settings["lr"]) + 1) ** 2


def test_a_search_that_was_interrupted_gives_the_trials_of_one_that_was_not(tmp_path: Path):
    optimizer = OptimizerConfig(fixed={"momentum": 0.9}, search={"lr": LR}, start={"lr": 0.01})
    straight = search("a", optimizer, SearchConfig(8), bowl, storage=tmp_path / "a.sqlite3", worst=100.0)
    search("a", optimizer, SearchConfig(3), bowl, storage=tmp_path / "b.sqlite3", worst=100.0)
    resumed = search("a", optimizer, SearchConfig(8), bowl, storage=tmp_path / "b.sqlite3", worst=100.0)
    assert [t["params"] for t in resumed.trials] == [t["params"] for t in straight.trials]
    assert straight.trials[0]["params"] == {"lr": 0.01}
    assert straight.settings["momentum"] == 0.9
    assert straight.value == min(trial["value"] for trial in straight.trials)


def test_a_trial_cut_off_by_a_kill_is_run_again_with_its_values(tmp_path: Path):
    optimizer = OptimizerConfig(search={"lr": LR})

    def killed(settings: dict) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search("a", optimizer, SearchConfig(2), killed, storage=tmp_path / "b.sqlite3", worst=100.0)
    resumed = search("a", optimizer, SearchConfig(2), bowl, storage=tmp_path / "b.sqlite3", worst=100.0)
    straight = search("a", optimizer, SearchConfig(2), bowl, storage=tmp_path / "a.sqlite3", worst=100.0)
    assert [t["params"] for t in resumed.trials] == [t["params"] for t in straight.trials]


def test_the_trial_of_a_dead_worker_is_run_again_with_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Optuna's heartbeat alone says who is dead, also of those that died before their first one."""
    storage, optimizer = tmp_path / "a.sqlite3", OptimizerConfig(search={"lr": LR})
    search("a", optimizer, SearchConfig(1), bowl, storage=storage, worst=100.0)
    study = optuna.load_study(study_name="a", storage=f"sqlite:///{storage}")
    dead = study.ask()
    lr = dead.suggest_float("lr", LR.low, LR.high, log=True)
    monkeypatch.setattr("benchmarks.common.search._age", lambda trial: math.inf if trial.number == dead.number else 0.0)
    found = search("a", optimizer, SearchConfig(3), bowl, storage=storage, worst=100.0)
    assert study.get_trials()[dead.number].state == optuna.trial.TrialState.FAIL
    assert [trial["params"] for trial in found.trials][1] == {"lr": lr}
    assert len(found.trials) == 3


def test_diverged_trials_are_results(tmp_path: Path):
    optimizer = OptimizerConfig(search={"lr": SearchRange(choices=[0.1, 0.9])})
    found = search("a", optimizer, SearchConfig(6), bowl, storage=tmp_path / "a.sqlite3", worst=100.0)
    assert {trial["diverged"] for trial in found.trials} == {True, False}
    assert all(trial["value"] == 100.0 for trial in found.trials if trial["diverged"])
    assert found.settings == {"lr": 0.1}


def test_a_search_without_ranges_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="the search ranges of 'sgd' are empty"):
        search("sgd", OptimizerConfig(), SearchConfig(1), bowl, storage=tmp_path / "a.sqlite3", worst=1.0)
    with pytest.raises(ValueError, match="either choices, or low and high"):
        SearchRange(low=1.0, high=2.0, choices=[1])


def test_json_holds_no_number_that_json_does_not_know(tmp_path: Path):
    path = results.write_json(tmp_path / "deep" / "a.json", {"a": math.inf, "b": [torch.tensor(1.5), Path("x")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, "x"]}
    assert list(path.parent.iterdir()) == [path]


def test_a_log_survives_a_line_that_was_cut_off(tmp_path: Path):
    log = tmp_path / "runs.jsonl"
    results.append_json_line(log, {"run": 1})
    log.write_text(log.read_text() + '{"run": 2, "lo')
    results.append_json_line(log, {"run": 3})
    assert [line["run"] for line in results.read_json_lines(log)] == [1, 3]
    assert list(results.read_json_lines(tmp_path / "none.jsonl")) == []


def test_a_run_of_the_log_is_not_made_again(tmp_path: Path):
    log = results.RunLog(tmp_path / "runs.jsonl")
    assert log.get({"lr": 0.1}, lambda: {"loss": math.inf}, seed=3) == {"loss": None}
    again = results.RunLog(tmp_path / "runs.jsonl")
    assert again.get({"lr": 0.1}, lambda: pytest.fail("made again")) == {"loss": None}
    assert again.get({"lr": 0.2}, lambda: {"loss": 1.0}) == {"loss": 1.0}
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])["seed"] == 3


def test_results_carry_versions_and_machine_but_no_names_of_it():
    description = results.provenance({"a": 1}, seed=3)
    assert description["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert description["machine"]["threads"] == 1
    assert not {"hostname", "user", "path"} & set(description["machine"])


def test_the_band_of_a_curve_goes_from_the_lowest_to_the_highest_run():
    curve = spread("a", [[0, 1, 2], [0, 2, 4]], [[3.0, 2.0, 1.0], [5.0, 4.0, 1.0]])
    assert curve.x == [0, 1, 2]  # as far as the shorter run goes
    assert curve.low == [3.0, 2.0, 1.0]
    assert curve.high == [5.0, 4.5, 4.0]


def test_a_page_escapes_its_text_describes_its_figures_and_opens_them_large(tmp_path: Path):
    figure = line_figure("below", [Curve("first run", [0, 1], [1.0, 0.1])], x_label="step", y_label="loss in nats")
    assert figure.png.startswith(b"\x89PNG")
    table = Table.of("caption <c>", [{"name": "<b>", "value": 1.23456, "seeds": [1.0, 3.0], "none": None}])
    page = write_page(tmp_path, "Title", [Report("One", ["text"], [table], {"loss": figure}, place="one/")])
    content = page.read_text()
    assert "http" not in content
    assert "&lt;b&gt;" in content
    assert "caption &lt;c&gt;" in content
    assert all(f"<td>{cell}</td>" in content for cell in ("1.23", "2 ± 1", "—"))
    assert content.count("data:image/png;base64,") == 1
    assert 'alt="Figure. loss in nats against step: first run"' in content
    assert '<a href="one/loss.png"' in content
    assert (tmp_path / "one" / "loss.png").read_bytes() == figure.png


def test_numbers_in_tables():
    assert [text(value) for value in (0.12345, 7, "x", None, math.nan, math.inf, [2.0])] == [
        *("0.123", "7", "x", "—", "—", "—", "2"),
    ]


def test_medians_over_seeds_count_a_miss_as_never():
    assert median([10, None, 20]) == 20
    assert median([10, None, None]) == math.inf
    assert median([10, math.nan]) == math.inf
    assert median([10, 30]) == 20
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_findings_are_data():
    found = Finding("it falls", "the last below the first", {"first": 2.0, "last": 0.5}, verdict(0.5 < 2.0))
    (row,) = findings_table("A study", [found]).frame.to_dict("records")
    assert row == {"the study": "it falls", "here": "yes", "rule": "the last below the first", "in numbers": "first 2; last 0.5"}
    assert [verdict(value) for value in (True, False, 1.0, 0.0, 0.5, None)] == ["yes", "no", "yes", "no", "in part", "not shown"]


def test_step_times_are_taken_in_turn_and_expensive_steps_count_with_their_share():
    calls: list[str] = []
    contestants = {
        "a": Timed(lambda: calls.append("a")),
        "b": Timed(lambda: calls.append("b"), stride=2),
    }
    seconds = interleave(contestants, 4, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 2}
    assert calls == ["a", "b", "a", "b", "a", "a", "b", "a"]
    assert cycle_ratio([1.0, 1.0, 1.0, 5.0] * 2, [1.0] * 8, period=4) == 2.0
    assert percentile([1.0] * 99 + [7.0], 99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def allocate(megabytes: int) -> None:
    """Work with a known peak: memory that was written to."""
    torch.ones(megabytes * 2**18)


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read from Unix")
def test_peak_memory_sees_what_was_allocated_and_freed():
    little, much = peak_bytes(allocate, 1), peak_bytes(allocate, 200)
    assert 150e6 < much - little < 260e6
