"""Which examples carry the gradient, and when: per-example gradients over a training run (Yashima et al.).

    python -m benchmarks.gradient_outliers --config configs/gradient_outliers/mnist.yaml --data-root data

SGD with several learning rates and batch sizes. At checkpoints, over the whole training set and layer by layer: norms of
the per-example gradients and their outliers, the largest eigenvalue of the empirical Fisher, the projections on its
eigenvector, what is left of the eigenvalue without the tenth of the examples that carry most of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import run_command
from benchmarks.common.config import resolved
from benchmarks.common.data import Dataset, load_data
from benchmarks.common.page import Figure, Table
from benchmarks.common.progress import progress
from benchmarks.common.results import fingerprint, read_json, write_json
from benchmarks.fisher import nets  # noqa: F401
from benchmarks.fisher.outliers.findings import fall, findings
from benchmarks.fisher.outliers.pictures import (
    drift_figure,
    outlier_figure,
    picture_figure,
    projection_figure,
    trimmed_figure,
)
from benchmarks.fisher.outliers.study import NETWORK, Moment, OutlierConfig, Run, Setting, follow
from benchmarks.fisher.report import Report, findings_table, run_script
from kfac_opt.fisher import symmetric_log_bins

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gradient_outliers" / "digits.yaml"
HEADER = (
    "run", "part", "outliers", "published rule", "λ max", "trimmed λ", "fall", "|a| < 0.1", "max / median |a|",
    "drift", "diffusion",
)  # fmt: skip
PUBLISHED = {
    ("cifar10", 16): (76.53, 30.60),
    ("cifar10", 256): (407.6, 55.66),
    ("mnist", 16): (0.3659, 1e-6),
    ("mnist", 256): (2.063, 0.2182),
}
"""λ max and trimmed λ at the end of training, by data and batch size."""


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs what is missing, prints the table, writes PNG, page, TensorBoard and JSON."""
    return run_script(OutlierConfig, run, arguments, __doc__ or "", DEFAULT_CONFIG)


def run(config: OutlierConfig) -> Report:
    """The experiment without its report's files; finished runs are read back from ``out``."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    runs = []
    with progress(len(config.settings) * config.num_checkpoints, config.name) as display:
        for setting in config.settings:
            finished = config.out / config.name / f"run-{_identity(config, setting)}.json"
            if not finished.is_file():
                found = follow(config, dataset, setting, lambda: display.advance(note=setting.label))  # noqa: B023
                write_json(finished, [vars(moment) for moment in found.moments])
            runs.append(Run(setting, [_moment(content) for content in read_json(finished)]))
    return make_report(config, dataset, runs)


def _identity(config: OutlierConfig, setting: Setting) -> str:
    content = {**resolved(config), "settings": resolved(setting)}
    return fingerprint({key: value for key, value in content.items() if key not in ("name", "num_pictures")})


def _moment(content: dict[str, Any]) -> Moment:
    """Numbers that were not finite come back as NaN."""
    return Moment(**json.loads(json.dumps(content).replace("null", "NaN")))


def make_report(config: OutlierConfig, dataset: Dataset, runs: list[Run]) -> Report:
    """Tables, figures, findings."""
    report = Report(
        title=f"Gradient outliers: {config.name}",
        text=[
            f"{config.model['name']} on {len(dataset.train_inputs)} examples of {config.data.name}, plain SGD. Gradients of "
            "all training examples at every checkpoint. Outliers: norm above median + 10 MAD; published rule: norm above 10 "
            "MAD. Trimmed λ: along the same eigenvector, without the tenth of the examples with the largest projections. "
            "Drift: norm of the mean gradient; diffusion: standard deviation of a mini-batch gradient.",
        ],
        findings=findings(runs),
    )
    report.tables = [
        Table("At the end of each run.", HEADER, [row for found in runs for row in _rows(found)]),
        *_published_table(config, runs),
        findings_table("Yashima, Ishikawa, Sato & Matsuoka", report.findings),
    ]
    last = runs[0].moments[-1]
    report.figures = {
        "outliers": Figure(
            outlier_figure(runs),
            "Number of outliers (left axis, whole network) and validation loss (right axis); the dotted line marks the lowest "
            "validation loss.",
        ),
        "projections": Figure(
            projection_figure(config, runs),
            "Projections a of all training gradients on the first eigenvector of the empirical Fisher, over the run: share of "
            "the examples per bin, logarithmic colour.",
        ),
        "trimmed": Figure(trimmed_figure(runs), "λ max of the network's empirical Fisher, and without the largest tenth."),
        "drift": Figure(drift_figure(runs), "Signal against noise of the mini-batch gradient over the run."),
    }
    if config.data.name != "shakespeare" and dataset.train_inputs.dim() == 4:
        report.figures["examples"] = Figure(
            picture_figure(dataset, last.largest),
            f"The examples with the largest gradients at the end of the run with {runs[0].setting.label}: index and label.",
        )
    report.content = {
        "bins": symmetric_log_bins(config.low, config.high).tolist(),
        "runs": [{"setting": vars(found.setting), "moments": [vars(moment) for moment in found.moments]} for found in runs],
    }
    for found in runs:
        tag = found.setting.label.replace(" ", "_").replace(",", "")
        for key in ("outliers", "eigenvalue", "trimmed_eigenvalue", "drift", "diffusion"):
            values = [(m.step, v) for m, v in zip(found.moments, found.curve(key)) if math.isfinite(v)]
            report.scalars[f"{tag}/{key}"] = values
        report.scalars[f"{tag}/validation_loss"] = [(m.step, m.validation_loss) for m in found.moments]
    return report


def _published_table(config: OutlierConfig, runs: list[Run]) -> list[Table]:
    """The study's trimmed eigenvalues beside ours, where it has such data."""
    rows = []
    for found in runs:
        published = PUBLISHED.get((config.data.name, found.setting.batch_size))
        if published is not None:
            part = found.moments[-1].parts[NETWORK]
            theirs = [f"{value:.4g}" for value in published] + [f"{1 - published[1] / published[0]:.1%}"]
            ours = [f"{part['eigenvalue']:.3g}", f"{part['trimmed_eigenvalue']:.3g}", f"{fall(part):.1%}"]
            rows.append([found.setting.label, *theirs, *ours])
    header = ("run", "λ max, published", "trimmed", "fall", "λ max, here", "trimmed", "fall")
    text = "The whole network at the end of training: the study's eigenvalues (given by batch size) beside ours."
    return [Table(text, header, rows)] if rows else []


def _rows(found: Run) -> list[list[str]]:
    rows = []
    for name, part in found.moments[-1].parts.items():
        rows.append(
            [
                found.setting.label,
                name,
                f"{part['outliers']:.0f}",
                f"{part['outliers_uncentered']:.0f}",
                f"{part['eigenvalue']:.3g}",
                f"{part['trimmed_eigenvalue']:.3g}",
                f"{fall(part):.0%}",
                f"{part['small_share']:.0%}",
                f"{part['peak_ratio']:.3g}",
                f"{part['drift']:.2g}",
                f"{part['diffusion']:.2g}",
            ]
        )
    return rows


if __name__ == "__main__":
    run_command(main)
