"""The experiments on the Fisher matrix run on tiny budgets and leave the files that they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import estimator_variance, fisher_spectrum, fisher_speed, gradient_outliers
from benchmarks.common.config import ConfigError, load_config
from benchmarks.common.models import build_model
from benchmarks.common.plain_sgd import SGDConfig
from benchmarks.common.results import plain
from benchmarks.gradient_outliers import checkpoints
from kfac_opt.fisher import FisherMatrix, spectral_density

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KINDS = {
    "fisher_spectrum": fisher_spectrum.SpectrumConfig,
    "estimator_variance": estimator_variance.VarianceConfig,
    "gradient_outliers": gradient_outliers.OutlierConfig,
    "fisher_speed": fisher_speed.SpeedConfig,
}
SHIPPED = [(kind, path) for name, kind in KINDS.items() for path in sorted((CONFIGS / name).glob("*.yaml"))]

SPECTRUM = """
name: tiny
data: {name: digits, num_train: 60, num_test: 30}
model: {name: mlp, sizes: [64, 6, 10]}
training: {steps: 10, batch_size: 20}
num_fisher: 20
num_seeds: 2
estimates:
  - {method: slq, vectors: 2, steps: 8, node_weights: quadrature}
  - {method: block_lanczos, vectors: 2, steps: 20, node_weights: snapped}
"""

VARIANCE = """
name: tiny
data: {name: digits, num_train: 60, num_test: 30}
hidden: [6]
training: {steps: 4, batch_size: 20}
num_inputs: 3
labels: [1, 4]
num_draws: 300
decays: [0.0, 0.5]
widths: [3, 4]
num_width_seeds: 2
norms: [0.5, 1.0]
snapshots: [0, 4]
num_probes: 2
"""

OUTLIERS = """
name: tiny
data: {name: digits, num_train: 60, num_test: 30}
model: {name: mlp, sizes: [64, 8, 8, 10]}
settings:
  - {lr: 0.1, batch_size: 10, epochs: 3}
  - {lr: 0.01, batch_size: 30, epochs: 2}
num_checkpoints: 4
"""

SPEED = """
name: tiny
model: {name: small_cnn, width: 2}
input_shape: [1, 8, 8]
num_examples: 20
batch_size: 10
rounds: 2
columns: 2
"""


def arguments(tmp_path: Path, content: str) -> list[str]:
    (tmp_path / "config.yaml").write_text(content)
    places = ["--out", str(tmp_path / "out"), "--keep", str(tmp_path / "keep")]
    return ["--config", str(tmp_path / "config.yaml"), *places]


def check_files(tmp_path: Path, stems: set[str]) -> dict:
    folder = tmp_path / "out" / "tiny"
    page = (folder / "index.html").read_text()
    content = json.loads((folder / "tiny.json").read_text())
    assert content["config"]["name"] == "tiny"
    assert content["versions"]["torch"]
    assert content["seed"] == 0
    for stem in stems:
        assert (folder / f"{stem}.png").stat().st_size > 2000
    assert page.count("<img") == len(stems)
    assert [path.name for path in (tmp_path / "keep").iterdir()] == ["tiny.json"]
    assert json.loads((tmp_path / "keep" / "tiny.json").read_text()) == content
    return content


@pytest.mark.parametrize(("kind", "path"), SHIPPED, ids=[f"{path.parent.name}/{path.stem}" for _, path in SHIPPED])
def test_shipped_configs_are_valid(kind: type, path: Path):
    config = load_config(kind, path)
    assert config.name
    if hasattr(config, "model"):
        build_model(config.model, 0)


def test_spectrum_script_leaves_tables_figures_and_findings(tmp_path: Path):
    report = fisher_spectrum.main(arguments(tmp_path, SPECTRUM))
    content = check_files(tmp_path, {"panels", "panels_log", "kfac"})
    assert len(content["spectra"]) == 6
    assert len(report.findings) == 4
    exact = next(s for s in content["spectra"] if (s["kind"], s["blocks"]) == ("exact", "full"))
    errors = {e["label"]: e["errors"][0]["wasserstein"] for e in exact["estimates"]}
    assert errors["block Lanczos 2 × 20, snapped"] < errors["SLQ 2 × 8"]
    assert 0.2 < content["kfac"]["trace"] / exact["trace"] < 5.0


def test_spectrum_of_a_linear_model_is_kfacs_own():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(1, 4)  # one example: the Kronecker product is exact
    kfac = fisher_spectrum.kfac_spectrum(model, x)
    exact = spectral_density(FisherMatrix(model, x), "exact")
    assert kfac.trace == pytest.approx(exact.trace, rel=1e-4)
    assert kfac.largest == pytest.approx(exact.largest, rel=1e-4)


def test_variance_script_predicts_what_sampled_matrices_show(tmp_path: Path):
    report = estimator_variance.main(arguments(tmp_path, VARIANCE))
    content = check_files(tmp_path, {"labels", "width", "norm", "training"})
    for check in [*content["labels"], *content["averages"]]:
        spread = (check["high"] - check["low"]) / 6  # three standard errors on both sides
        assert abs(check["predicted"] - check["seen"]) < 5 * spread
    by_statement = {finding.statement: finding.verdict for finding in report.findings}
    assert by_statement["‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗H‖ / m"] == "yes"
    assert any("is worth 39 labels per input" in note for note in report.notes)


def test_outlier_script_follows_the_runs_and_reads_finished_ones_back(tmp_path: Path, monkeypatch):
    report = gradient_outliers.main(arguments(tmp_path, OUTLIERS))
    content = check_files(tmp_path, {"outliers", "projections", "trimmed"})
    moments = content["runs"][0]["moments"]
    assert [moment["step"] for moment in moments] == [0, 2, 8, 18]
    assert all(sum(moment["histogram"]) == 60 for moment in moments)
    assert set(moments[0]["parts"]) == {"(network)", "1", "3", "5"}
    assert moments[-1]["train_loss"] < moments[0]["train_loss"]
    monkeypatch.setattr(gradient_outliers, "follow", None)  # nothing is trained again
    again = gradient_outliers.main(arguments(tmp_path, OUTLIERS))
    assert json.dumps(plain(again.content)) == json.dumps(plain(report.content))


def test_checkpoints_grow_apart_and_end_at_the_end():
    assert checkpoints(100, 5) == [0, 6, 25, 56, 100]
    assert checkpoints(2, 5) == [0, 1, 2]


@pytest.mark.parametrize("with_peer", [True, False])
def test_speed_script_works_with_and_without_the_peer(tmp_path: Path, monkeypatch, with_peer):
    if with_peer:
        pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    else:
        monkeypatch.setattr(fisher_speed, "PEER", "no_such_package")
    report = fisher_speed.main(arguments(tmp_path, SPEED))
    content = check_files(tmp_path, {"times"})
    assert len(content["seconds"]) == (8 if with_peer else 6)
    assert len(report.findings) == (3 if with_peer else 0)


def test_configs_that_cannot_be_used_are_named(tmp_path: Path):
    for kind, content, override, message in (
        (fisher_spectrum.SpectrumConfig, SPECTRUM, ("num_fisher", 0), "num_fisher and num_seeds must be >= 1"),
        (fisher_spectrum.SpectrumConfig, SPECTRUM, ("estimates", []), "estimates not empty"),
        (estimator_variance.VarianceConfig, VARIANCE, ("widths", []), "widths must not be empty"),
        (estimator_variance.VarianceConfig, VARIANCE, ("num_draws", 1), "num_draws >= 2"),
        (gradient_outliers.OutlierConfig, OUTLIERS, ("num_checkpoints", 2), "num_checkpoints >= 3"),
        (gradient_outliers.OutlierConfig, OUTLIERS, ("settings", []), "settings must not be empty"),
    ):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_config(kind, tmp_path / "config.yaml", [override])
    with pytest.raises(ValueError, match="training needs steps >= 0"):
        SGDConfig(steps=-1)
