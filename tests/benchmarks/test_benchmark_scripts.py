"""Every script runs on a tiny budget, resumes, and leaves the files that it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import compare_optimizers, demo, robustness, step_time
from benchmarks.common.config import load_config
from benchmarks.common.report import CONFIGS

TINY_TASK = """
task:
  data: {name: digits, flatten: true, num_train: 200, num_test: 50}
  model: {name: mlp, sizes: [64, 12, 12, 10]}
  steps: 12
  batch_size: 32
  eval_interval: 4
"""

COMPARISON = f"""
name: tiny
{TINY_TASK}
search: {{num_trials: 2}}
num_seeds: 2
optimizers:
  sgd: {{fixed: {{momentum: 0.9}}, search: {{lr: {{low: 0.01, high: 0.3, log: true}}}}}}
  adamw: {{search: {{lr: {{low: 1e-3, high: 1e-2, log: true}}}}}}
  kfac: {{start: {{lr: 0.1}}, search: {{lr: {{low: 0.01, high: 0.3, log: true}}}}}}
  ekfac: {{start: {{lr: 0.1}}, search: {{lr: {{low: 0.01, high: 0.3, log: true}}}}}}
defaults: [kfac]
"""

GRID = f"""
name: tiny
{TINY_TASK}
lrs: [0.03, 0.3]
dampings: [0.01, 1.0]
inverse_intervals: [1, 10]
target:
  settings: {{search: {{lr: {{low: 1e-3, high: 1e-2, log: true}}}}}}
  search: {{num_trials: 2}}
"""

STEPS = """
name: tiny
workloads:
  mlp: {model: {name: mlp, sizes: [20, 8, 10]}, batch_size: 16, input_shape: [20]}
  gpt:
    model: {name: gpt, vocabulary: 7, context: 6, num_layers: 1, width: 8, num_heads: 2}
    batch_size: 2
    input_shape: [6]
    num_classes: 7
    inputs: tokens
ratios: {capture: [capture, plain]}
contestants:
  SGD: {settings: {lr: 1e-3, momentum: 0.9}}
  plain: {kind: forward_backward, stride: 2}
  capture: {kind: capture, stride: 2}
  KFAC: {optimizer: kfac, settings: {lr: 1e-3, factor_interval: 2, inverse_interval: 4, ramp_steps: 0}, period: 4}
"""


def write(folder: Path, content: str) -> str:
    path = folder / "config.yaml"
    path.write_text(content)
    return str(path)


@pytest.fixture
def counted_training(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the training runs of a comparison."""
    calls: list[int] = []
    real = compare_optimizers.train

    def counting(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(compare_optimizers, "train", counting)
    return calls


def test_a_comparison_leaves_page_figures_json_tensorboard_and_summary(
    tmp_path: Path, counted_training: list[int], capsys: pytest.CaptureFixture[str]
):
    arguments = ["--config", write(tmp_path, COMPARISON), "--out", str(tmp_path / "out"), "--keep", str(tmp_path / "k")]
    compare_optimizers.main(arguments)
    printed, folder = capsys.readouterr().out, tmp_path / "out" / "tiny"
    assert str(folder / "index.html") in printed
    assert "KFAC (defaults)" in printed
    assert {"index.html", "tiny.json", "loss_steps.png", "loss_seconds.png", "test_error.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 5 * 2
    assert len(list((folder / "tensorboard").glob("*/events*"))) == 5 * 2
    assert len(counted_training) == 4 * 2 + 5 * 2  # equal budgets for the four that search, two seeds for all
    kept = json.loads((tmp_path / "k" / "tiny.json").read_text())
    assert [summary["num_trials"] for summary in kept["summaries"]] == [2, 2, 2, 2, 0]
    assert kept["versions"]["torch"]
    assert kept["machine"]["cores"] >= 1
    assert str(tmp_path) not in json.dumps(kept)
    assert (tmp_path / "k" / "tiny.json").stat().st_size < 100_000


def test_the_same_command_trains_nothing_again_and_other_settings_do(tmp_path: Path, counted_training: list[int]):
    arguments = ["--config", write(tmp_path, COMPARISON), "--out", str(tmp_path / "out")]
    arguments += ["--optimizers", "{adamw: {search: {lr: {low: 1e-3, high: 1e-2}}}}", "--defaults", "[]"]
    compare_optimizers.main(arguments)
    first = len(counted_training)
    compare_optimizers.main(arguments)
    assert len(counted_training) == first == 2 + 2
    compare_optimizers.main([*arguments, "--search.num_trials", "3", "--num-seeds", "1"])
    assert first + 1 <= len(counted_training) <= first + 2  # one more trial; its setting may be a new best
    compare_optimizers.main([*arguments, "--task.steps", "8"])
    assert len(counted_training) >= first + 1 + 4  # another task: nothing is reused


def test_targets_and_reach_are_those_of_the_reference(tmp_path: Path):
    arguments = ["--config", write(tmp_path, COMPARISON), "--out", str(tmp_path / "out"), "--defaults", "[]"]
    compare_optimizers.main(arguments)
    content = json.loads((tmp_path / "out" / "tiny" / "tiny.json").read_text())
    adamw = next(s for s in content["summaries"] if s["name"] == "adamw")
    assert content["best_target"] == min(adamw["final_loss"])
    assert content["median_target"] == pytest.approx(sum(adamw["final_loss"]) / 2)
    assert adamw["reach_best_steps"][adamw["final_loss"].index(content["best_target"])] <= 12


def test_a_shortened_run_has_a_search_and_a_schedule_of_its_own(tmp_path: Path, counted_training: list[int]):
    arguments = ["--config", write(tmp_path, COMPARISON), "--out", str(tmp_path / "out"), "--defaults", "[]"]
    compare_optimizers.main([*arguments, "--task.schedule", "{name: linear, final: 0.0}"])
    first = len(counted_training)
    compare_optimizers.main([*arguments, "--task.schedule", "{name: linear, final: 0.0}", "--shortened", "{kfac: 0.5}"])
    assert len(counted_training) == first + 2 + 2  # the others are not touched
    content = json.loads((tmp_path / "out" / "tiny" / "tiny.json").read_text())
    names = [summary["name"] for summary in content["summaries"]]
    assert names == ["sgd", "adamw", "kfac", "ekfac", "kfac-0.5"]
    assert content["summaries"][-1]["label"] == "KFAC (0.5 of the steps)"
    assert content["summaries"][-1]["num_trials"] == 2
    full, half = (content["curves"][name][0]["steps"][-1] for name in ("kfac", "kfac-0.5"))
    assert (full, half) == (12, 6)


def test_the_grid_counts_every_setting_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["--config", write(tmp_path, GRID), "--out", str(tmp_path / "out"), "--keep", str(tmp_path / "kept")]
    counts = robustness.main(arguments).content["counts"]
    assert [(c["curvature"], c["inverse_interval"], c["num_settings"]) for c in counts] == [
        ("kronecker", 1, 4),
        ("kronecker", 10, 4),
        ("eigenbasis", 1, 4),
        ("eigenbasis", 10, 4),
    ]
    assert all(0 <= c["num_reached"] <= 4 and c["median_loss"] <= c["worst_loss"] for c in counts)
    log = tmp_path / "out" / "tiny" / "runs.jsonl"
    lines = log.read_text().splitlines()
    assert len(lines) == 16
    log.write_text("\n".join(lines[:10]) + "\n" + lines[10][:30])  # killed in the middle of a line
    again: list[dict] = []
    real = robustness.run_cell

    def counting(config, task, cell):
        again.append(cell)
        return real(config, task, cell)

    monkeypatch.setattr(robustness, "run_cell", counting)
    assert robustness.main(arguments).content["counts"] == counts
    assert len(again) == 6
    assert json.loads((tmp_path / "kept" / "tiny.json").read_text())["counts"]


def test_diverged_settings_are_counted_as_such(tmp_path: Path):
    options = ["--lrs", "[1e6]", "--dampings", "[1e-8]", "--curvatures", "[kronecker]", "--inverse-intervals", "[1]"]
    options += ["--settings", "{update_scale: natural, kl_clip: null, max_relative_update: null}", "--target-loss", "0.5"]
    report = robustness.main(["--config", write(tmp_path, GRID), "--out", str(tmp_path / "out"), *options])
    (line,) = report.content["counts"]
    assert (line["num_diverged"], line["num_reached"], line["worst_loss"]) == (1, 0, math.inf)
    assert report.tables[0].frame["fastest steps"][0] == "—"


def test_step_times_are_ratios_to_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--config", write(tmp_path, STEPS), "--out", str(tmp_path / "out"), "--measure-memory", "false"]
    results = step_time.main([*arguments, "--keep", str(tmp_path / "kept")]).content["results"]
    assert set(results) == {"mlp", "gpt"}
    for found in results.values():
        by_name = {result["contestant"]: result for result in found}
        assert by_name["SGD"]["mean_ratio"] == by_name["SGD"]["median_ratio"] == 1.0
        assert by_name["SGD"]["state_over_parameters"] == pytest.approx(1.0)
        assert by_name["KFAC"]["num_steps"] == 4
        assert by_name["KFAC"]["state_bytes"] > by_name["SGD"]["state_bytes"]
        assert by_name["plain"]["num_steps"] == by_name["capture"]["num_steps"] == 2
        assert all(result["median_seconds"] > 0 and result["max_over_p50"] >= result["p99_over_p50"] for result in found)
    content = json.loads((tmp_path / "kept" / "tiny.json").read_text())
    assert content["ratios"]["mlp"]["capture"] > 0
    assert "gpt: capture " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_peak_memory_is_measured_beside_the_reference(tmp_path: Path):
    arguments = ["--config", write(tmp_path, STEPS), "--out", str(tmp_path / "out"), "--only", "[mlp]"]
    contestants = "{SGD: {settings: {lr: 1e-3}}, AdamW: {optimizer: adamw}}"
    report = step_time.main([*arguments, "--contestants", contestants, "--ratios", "{}"])
    peaks = [result["peak_bytes_above_reference"] for result in report.content["results"]["mlp"]]
    assert peaks[0] == 0
    assert peaks[1] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "Adam"], "reference must be one of SGD, plain, capture, KFAC, got 'Adam'"),
        (["--reference", "plain"], r"contestants\.plain\.stride must be 1"),
        (["--ratios", "{a: [SGD]}"], r"ratios\.a must name two of"),
        (["--only", "[vgg]"], r"only: unknown workloads \['vgg'\]; allowed: mlp, gpt"),
        (["--contestants.KFAC.period", "0"], "stride and period must be >= 1"),
    ],
)
def test_wrong_step_time_configs_end_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    import re

    with pytest.raises(SystemExit) as ended:
        step_time.main(["--config", write(tmp_path, STEPS), *options])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_demo_ends_with_the_path_of_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = demo.main(["--out", str(tmp_path), "--scale", "0.05", "--only", "[Optimizers compared]"])
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    content = page.read_text()
    assert all(name in content for name in ("SGD", "AdamW", "KFAC", "EKFAC", "Training loss against training time"))
    assert content.count("data:image/png;base64,") == 3


def test_every_section_of_the_demo_has_a_config_and_a_command_that_exist():
    titles = [section.title for section in demo.SECTIONS]
    assert titles[:3] == ["Optimizers compared", "The effect of damping", "Weight uncertainty"]
    for section in demo.SECTIONS:
        kind, file = section.config
        smaller = section.smaller(load_config(kind, CONFIGS / file), demo.DemoConfig(scale=0.01))
        assert isinstance(smaller, kind)
        module, _, config, *_ = section.more.split()
        assert (CONFIGS.parent / "benchmarks" / f"{module}.py").is_file()
        assert (CONFIGS.parent / config).is_file()
