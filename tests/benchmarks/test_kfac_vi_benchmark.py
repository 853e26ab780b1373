"""The experiment on weight uncertainty: tiny budgets, resuming, divergences, schedules."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import kfac_vi, kfac_vi_time
from benchmarks.common.config import ConfigError, load_config
from benchmarks.common.data import DataConfig, Dataset
from benchmarks.common.search import SearchConfig, SearchRange
from benchmarks.vi import data as vi_data
from benchmarks.vi import methods
from benchmarks.vi.config import MethodConfig, RateSchedule, VIConfig
from benchmarks.vi.evaluation import evaluate
from kfac_opt.bayes.prediction import predict

TINY = """
name: tiny
data: {name: digits, num_train: 100, num_test: 40}
model: {name: mlp, sizes: [64, 12, 10]}
epochs: 6
batch_size: 25
predict_samples: 3
evaluations: 2
angles: [0.0, 90.0]
num_seeds: 2
methods:
  sgd: {kind: sgd, settings: {lr: 0.05}}
  ensemble: {kind: sgd, members: 2, settings: {lr: 0.05}}
  dropout: {kind: adamw, dropout: 0.2}
  laplace: {kind: kfac, laplace: linearized}
  drawn laplace: {kind: kfac, laplace: samples}
  chosen laplace: {kind: kfac, laplace: linearized, settings: {laplace_prior: 50.0}}
  vi: {kind: kfac_vi, num_samples: 2}
  rules: {kind: kfac_vi, num_samples: 0, settings: {published_decay: 1e-3}}
  broken: {kind: sgd, settings: {lr: 1.0e+30}}
"""


@pytest.fixture
def config(tmp_path: Path) -> VIConfig:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return dataclasses.replace(load_config(VIConfig, tmp_path / "tiny.yaml"), out=tmp_path / "out")


def test_script_writes_results_figures_and_page_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--keep", str(tmp_path / "keep")]
    kfac_vi.main(arguments)
    folder = tmp_path / "out" / "tiny"
    assert {"index.html", "tiny.json", "accuracy.png", "reliability.png", "rotation.png"} <= {p.name for p in folder.iterdir()}
    results = json.loads((folder / "tiny.json").read_text())
    assert {"versions", "machine", "config", "seed"} <= results.keys()
    assert results["results"]["broken"]["summary"]["diverged"] == 2
    assert "broken (2 diverged)" in capsys.readouterr().out
    assert results["results"]["sgd"]["summary"]["samples"] is None
    for name in ("ensemble", "dropout", "laplace", "drawn laplace", "chosen laplace", "vi"):
        summary = results["results"][name]["summary"]["samples"]
        assert 0 < summary["nll"]["mean"] < 10
        assert summary["nll"]["std"] > 0
    assert results["results"]["rules"]["summary"]["samples"] is None
    assert (tmp_path / "keep" / "tiny.json").is_file()
    monkeypatch.setattr(kfac_vi, "train_method", lambda *_: pytest.fail("a finished run was run again"))
    kfac_vi.main(arguments)


def test_search_runs_on_validation_examples_and_is_kept(config: VIConfig, monkeypatch: pytest.MonkeyPatch):
    method = MethodConfig("sgd", search={"lr": SearchRange(0.01, 0.1, log=True)})
    budget = SearchConfig(num_trials=2)
    searched = dataclasses.replace(config, methods={"sgd": method}, search=budget, num_validation=30, num_seeds=1)
    first = kfac_vi.run(searched).content["results"]["sgd"]["settings"]
    assert 0.01 <= first["lr"] <= 0.1
    sets = vi_data.load_for_search(searched)
    assert len(sets.train_inputs) == 100
    assert len(sets.test_inputs) == 30
    training = vi_data.load_sets(searched)
    assert torch.equal(sets.train_targets, training.train_targets)
    monkeypatch.setattr(kfac_vi, "ensemble_nll", lambda *_: pytest.fail("a finished trial was run again"))
    assert kfac_vi.run(searched).content["results"]["sgd"]["settings"] == first


def test_a_search_without_validation_examples_is_refused(config: VIConfig):
    with pytest.raises(ValueError, match="settings must not be chosen on the test set"):
        dataclasses.replace(config, search=SearchConfig(num_trials=1))
    with pytest.raises(ConfigError, match=r"only: unknown methods \['nobody'\]"):
        dataclasses.replace(config, only=["nobody"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sgd", "num_samples": 2}, "num_samples concerns kfac_vi and ivon"),
        ({"kind": "kfac_vi", "num_samples": -1}, "num_samples must be >= 0"),
        ({"kind": "sgd", "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"kind": "kfac", "members": 2, "laplace": "samples"}, "choose one"),
    ],
)
def test_methods_that_make_no_sense_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**arguments)


def test_published_schedule_warms_up_and_decays_to_almost_zero():
    schedule = RateSchedule("polynomial", warmup_steps=1000, initial=0.1, power=2.0)
    assert schedule.factor(0, 11_730, 782) == pytest.approx(0.1)
    assert schedule.factor(500, 11_730, 782) == pytest.approx(0.55)
    assert schedule.factor(1000, 11_730, 782) == pytest.approx(1.0)
    middle, end = 6000, 11_730
    assert schedule.factor(middle, 11_730, 782) == pytest.approx((1 - (middle - 1000) / (11_730 + 782 - 1000)) ** 2)
    assert 0 < schedule.factor(end, 11_730, 782) < 0.01
    assert RateSchedule("cosine").factor(50, 100, 10) == pytest.approx(0.5)
    assert RateSchedule("constant").factor(99, 100, 10) == 1.0


def test_a_net_that_guesses_counts_as_diverged(config: VIConfig):
    data = vi_data.load_sets(config)
    method = MethodConfig("sgd", {"lr": 0.0})
    trained = methods.train_method(method, method.settings, data, config, 0)
    assert trained.diverged
    result = evaluate(trained, data, config, 0)
    assert result["mean"]["nll"] == pytest.approx(math.log(10), abs=0.3)
    share = result["mean"]["accuracy"]
    assert result["mean"]["error"]["accuracy"] == pytest.approx((share * (1 - share) / 40) ** 0.5)
    chosen = trained.at_mean(data.test_inputs).probabilities[range(40), data.test_targets].log()
    assert result["mean"]["error"]["nll"] == pytest.approx(float(chosen.var(correction=0) / 40) ** 0.5)


def test_nets_with_posteriors_predict_as_a_mixture(config: VIConfig):
    data = vi_data.load_sets(config)
    method = MethodConfig("kfac_vi", members=2)
    assert method.cost == 2
    trained = methods.train_method(method, {}, data, config, 0)
    single = methods.train_method(MethodConfig("kfac_vi"), {}, data, config, 0)
    assert len(trained.posteriors) == len(trained.models) == 2
    source = torch.Generator().manual_seed(3)
    each = [predict(m, q, data.test_inputs, 3, source) for m, q in zip(trained.models, trained.posteriors, strict=True)]
    found, alone = (t.ensemble(data.test_inputs, 6, 3) for t in (trained, single))
    assert found is not None
    assert alone is not None
    assert torch.equal(found.probabilities, (each[0].probabilities + each[1].probabilities) / 2)
    assert float(found.mutual_information.mean()) > float(alone.mutual_information.mean())
    with torch.no_grad():
        at_means = [model(data.test_inputs).softmax(-1) for model in trained.models]
    torch.testing.assert_close(trained.at_mean(data.test_inputs).probabilities, (at_means[0] + at_means[1]) / 2)
    torch.testing.assert_close(single.at_mean(data.test_inputs).probabilities, at_means[0])


def test_laplace_takes_its_prior_from_the_settings_or_from_the_evidence(config: VIConfig, tmp_path: Path):
    data = vi_data.load_sets(config)
    method, store = MethodConfig("kfac", laplace="linearized"), tmp_path / "members"
    found = [
        methods.train_method(method, settings, data, config, 0, store).posteriors[0]
        for settings in ({"laplace_prior": 50.0}, {})
    ]
    assert found[0].width.prior_precision == 50.0
    assert found[1].width.prior_precision != 50.0
    assert len(list((tmp_path / "members").iterdir())) == 1  # the net is the same


def test_ivon_is_left_out_where_it_is_not_installed(config: VIConfig, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    report = kfac_vi.run(dataclasses.replace(config, methods={"ivon": MethodConfig("ivon")}))
    assert report.content["results"] == {}
    assert "'ivon' is left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="needs the package ivon-opt"):
        methods.build(MethodConfig("ivon"), {}, nn.Linear(2, 2), 10, 0)


def test_rotation_by_a_right_angle_turns_and_by_none_keeps():
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(vi_data.rotated(images, 0.0), images)
    turned = vi_data.rotated(images, 90.0)
    candidates = [torch.rot90(images, k, (2, 3)) for k in (1, 3)]
    assert any(torch.allclose(turned, other, atol=1e-5) for other in candidates)


def test_shuffling_moves_every_image_alike_and_loses_nothing():
    images = torch.arange(2 * 3 * 16.0).reshape(2, 3, 4, 4)
    moved = vi_data.shuffled(images)
    assert not torch.equal(moved, images)
    assert torch.equal(moved.flatten(2).sort(-1).values, images.flatten(2))
    assert torch.equal(moved[1] - moved[0], images[1] - images[0])


def test_dropout_goes_before_linear_layers_but_not_before_the_first_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    kinds = [type(layer).__name__ for layer in methods.with_dropout(net, 0.3)]
    assert kinds == ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]
    assert methods.with_dropout(net, 0.0) is net


def test_an_unfamiliar_data_set_enters_the_detection(config: VIConfig, monkeypatch: pytest.MonkeyPatch):
    data = vi_data.load_sets(config)
    wanted = dataclasses.replace(config, unfamiliar=DataConfig("mnist"))
    other = torch.randn(20, 1, 8, 8)
    blank = Dataset("other", other, torch.zeros(20).long(), other, torch.zeros(20).long(), 10)
    monkeypatch.setattr(vi_data, "load_data", lambda *_: blank)
    method = MethodConfig("kfac_vi")
    trained = methods.train_method(method, {}, data, config, 0)
    detection = evaluate(trained, data, wanted, 0)["samples"]["detection"]
    assert set(detection) == {"shuffled", "rotated", "unfamiliar"}
    assert 0 <= detection["unfamiliar"]["auroc_mutual_information"] <= 1


def test_times_are_ratios(tmp_path: Path):
    arguments = ["--rounds", "3", "--predict_samples", "2", "--predict_batches", "[2]", "--out", str(tmp_path)]
    arguments += ["--model", "{name: mlp, sizes: [6, 5, 10]}", "--input_shape", "[6]", "--batch_size", "8"]
    ratios = kfac_vi_time.main(arguments).content["ratios"]
    assert len(ratios) == 8
    assert all(value > 0 for value in ratios.values())


def test_the_table_holds_every_method_and_way_to_predict(config: VIConfig):
    report = kfac_vi.run(dataclasses.replace(config, num_seeds=1))
    table = report.tables[0].frame
    assert len(report.figures) == 3
    assert set(table["at"]) == {"mean", "samples"}
    for row in table.to_dict("records"):
        found = report.content["results"][row["method"].split(" (")[0]]["summary"][row["at"]]
        assert row["NLL"] == ("—" if found is None else f"{found['nll']['mean']:.4f} ± {found['nll']['std']:.4f}")


@pytest.mark.parametrize("path", sorted((Path(kfac_vi.__file__).parent.parent / "configs" / "kfac_vi").glob("*.yaml")))
def test_every_shipped_config_is_read_and_its_optimizers_built(path: Path):
    from benchmarks.common.models import build_model

    config = load_config(VIConfig, path)
    for method in config.methods.values():
        if not methods.is_installed(method):
            continue
        settings = {**method.settings, **{name: value for name, value in method.start.items()}}
        methods.build(method, settings, build_model({"name": "mlp", "sizes": [4, 3]}, 0), 100, 0)


def test_nets_are_trained_once_for_all_ensembles_that_hold_them(
    config: VIConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = vi_data.load_sets(config)
    store = tmp_path / "members"
    trained_seeds = []
    train_one = methods._train_one

    def counted(*arguments):
        trained_seeds.append(arguments[-1])
        return train_one(*arguments)

    monkeypatch.setattr(methods, "_train_one", counted)
    pair = methods.train_method(MethodConfig("kfac_vi", members=2), {}, data, config, 0, store)
    three = methods.train_method(MethodConfig("kfac_vi", members=3), {}, data, config, 0, store)
    assert trained_seeds == [0, 1000, 2000]
    again = methods.train_method(MethodConfig("kfac_vi", members=2), {}, data, config, 0, store)
    assert (again.seconds, again.curve, again.diverged) == (pair.seconds, pair.curve, pair.diverged)
    assert three.seconds > pair.seconds
    fresh, kept = (one.ensemble(data.test_inputs, 4, 3) for one in (pair, again))
    assert fresh is not None
    assert kept is not None
    assert torch.equal(fresh.probabilities, kept.probabilities)
    methods.train_method(MethodConfig("kfac_vi", members=2), {"lr": 0.03}, data, config, 0, store)
    methods.train_method(MethodConfig("kfac_vi", members=2), {}, data, config, 0, None)
    assert trained_seeds[3:] == [0, 1000, 0, 1000]  # other settings, no store
    method = MethodConfig("kfac", laplace="linearized")
    fitted = [methods.train_method(method, {}, data, config, 0, store).ensemble(data.test_inputs, 4, 3) for _ in range(2)]
    assert fitted[0] is not None
    assert fitted[1] is not None
    assert torch.allclose(fitted[0].probabilities, fitted[1].probabilities)
    assert trained_seeds[7:] == [0]
